"""What holds for every objective that looks at a step before its first gradient, and of every first step."""

from __future__ import annotations

import pytest
import torch

from aligndistil.objectives.base import Objective, Prepares, Role
from support.micro_batches import Work, assert_added_up, examples_of, found_in, loss_of, random_work, take
from support.objectives import EVERY_OBJECTIVE, named
from support.plain_formula import chunked_preparation, means, plain_preparation, plain_terms, step_means

every_preparing = pytest.mark.parametrize(
    "objective", [o for o in EVERY_OBJECTIVE if o.prepares is not Prepares.NOTHING], ids=named
)


@every_preparing
def test_the_preparation_of_micro_batches_adds_up_too(objective: Objective) -> None:
    work = random_work(objective, examples=4)
    whole = plain_preparation(objective, work.looked_at, work.before)
    works = [take(work, rows) for rows in examples_of(work.batch)]
    parts = [plain_preparation(objective, part.looked_at, part.before) for part in works]
    assert_added_up([part.metrics for part in parts], whole.metrics)
    for name, values in whole.terms.items():
        torch.testing.assert_close(torch.cat([part.terms[name] for part in parts]), values, msg=name)


@every_preparing
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_chunked_engine_prepares_the_same(objective: Objective, chunk: int) -> None:
    work = random_work(objective)
    plain = plain_preparation(objective, work.looked_at, work.before)
    chunked = chunked_preparation(objective, work.looked_at, work.before, chunk)
    torch.testing.assert_close(chunked.terms, plain.terms)
    assert_added_up([chunked.metrics], plain.metrics)


@every_preparing
def test_what_a_preparation_finds_has_names_of_its_own(objective: Objective) -> None:
    """Its metrics are logged beside those of the loss, and its terms stand beside those of the models."""
    work = random_work(objective)
    prepared = plain_preparation(objective, work.looked_at, work.before)
    found = prepared.metrics.keys() | prepared.terms.keys()
    assert not found & plain_terms(objective, work.batch, work.logits).keys()
    loss = loss_of(objective, work)
    assert not found & (loss.metrics.keys() | loss.maxima.keys())
    assert all(part.shape == () for metric in prepared.metrics.values() for part in metric)
    assert all(values.shape == work.batch.ids_BT.shape for values in prepared.terms.values())
    over_step = {name: float(mean) for name, mean in step_means([prepared]).items()}
    assert objective.next_state(objective.initial_state(), over_step, 8).keys() == objective.initial_state().keys()


@pytest.mark.parametrize("objective", [o for o in EVERY_OBJECTIVE if o.first_step()], ids=named)
def test_what_is_known_of_the_first_step_is_true(objective: Objective) -> None:
    """Where the policy starts as the reference, whatever the other models are."""
    work = random_work(objective, moved=0.0)
    logits = {**work.logits, Role.REFERENCE: work.logits[Role.POLICY]}
    before = {**work.before, Role.REFERENCE: work.before[Role.POLICY]} if work.before else {}
    start = Work(work.batch, logits, work.looked_at, before)
    loss, found = loss_of(objective, start), found_in(objective, [start])[0]
    values = {name: float(value) for name, value in found.items() if value.ndim == 0}
    values |= {"loss": float(loss.per_example.mean().detach())}
    values |= means(loss.metrics)
    for expected in objective.first_step():
        assert values[expected.metric] == pytest.approx(expected.value, abs=1e-12), expected.metric
