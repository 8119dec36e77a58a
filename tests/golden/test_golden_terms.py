"""Golden files that begin at numbers about tokens: rewards, advantages, returns, losses of policy and critic."""

from __future__ import annotations

import pytest
import torch
from case import FOLDER, TermsCase
from readers import TERMS_READERS, cases_of
from torch import Tensor

from aligndistil.objectives.base import Loss, Prepared
from support.plain_formula import means, step_means

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FILES = [path for path in sorted(FOLDER.glob("*.json")) if path.stem in TERMS_READERS]
CASES = [pytest.param(case, id=f"{path.stem}-{case.name}") for path in FILES for case in cases_of(path) or []]
every_case = pytest.mark.parametrize("case", CASES)


def prepared(case: TermsCase) -> Prepared:
    if case.rollout is None:
        return Prepared({}, {})
    return case.objective.prepare(case.batch, case.rollout, case.objective.initial_state())


def update(case: TermsCase) -> tuple[dict[str, Tensor], Loss]:
    """The leaves, and the loss in them."""
    leaves = {name: values.clone().requires_grad_() for name, values in case.terms.items()}
    found = prepared(case)
    return leaves, case.objective.loss(case.batch, {**leaves, **found.terms, **step_means([found])})


@every_case
def test_what_the_preparation_finds_equals_the_golden_values(case: TermsCase) -> None:
    found = prepared(case).terms
    assert found.keys() == case.prepared.keys()
    for name, expected in case.prepared.items():
        where = case.batch.response_BT
        torch.testing.assert_close(found[name][where], expected[where], **EXACT, msg=name)


@every_case
def test_losses_and_gradients_equal_the_golden_ones(case: TermsCase) -> None:
    leaves, loss = update(case)
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    if case.loss is not None:
        torch.testing.assert_close(float(loss.per_example.mean().detach()), case.loss, **tolerance)
    if case.critic_loss is not None:
        assert loss.critic_per_example is not None
        torch.testing.assert_close(float(loss.critic_per_example.mean().detach()), case.critic_loss, **EXACT)
    for name, expected in case.gradients.items():
        of_critic = name == "critic_value"
        losses = loss.critic_per_example if of_critic else loss.per_example
        assert losses is not None
        (found,) = torch.autograd.grad(losses.mean(), leaves[name])
        torch.testing.assert_close(found, expected, **(EXACT if of_critic else tolerance), msg=name)


@every_case
def test_metrics_equal_the_golden_ones(case: TermsCase) -> None:
    loss = update(case)[1]
    values = means(loss.metrics) | loss.maxima | step_means([prepared(case)])
    for name, expected in case.metrics.items():
        assert float(values[name]) == pytest.approx(expected, rel=case.tolerance, abs=case.tolerance), name


@every_case
def test_pieces_equal_the_golden_ones(case: TermsCase) -> None:
    for name, (ours, expected) in case.pieces.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if name.startswith("whitened") else EXACT
        torch.testing.assert_close(ours, expected, **tolerance, msg=name)
