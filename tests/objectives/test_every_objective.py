"""What holds for every objective of the registry, whatever its mathematics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aligndistil.objectives
from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.base import Need, Objective, Role
from support.micro_batches import (
    assert_added_up,
    changed,
    examples_of,
    found_in,
    gradients,
    loss_of,
    losses_of,
    outcome,
    random_work,
    read_at,
    rows_of,
    take,
)
from support.objectives import EVERY_OBJECTIVE, language_roles, named
from support.plain_formula import Logits, plain_loss

FILES = sorted(Path(aligndistil.objectives.__file__).parent.glob("*.py"))
PROTOCOL = ("base", "types", "metrics", "actor_critic")
every_objective = pytest.mark.parametrize("objective", EVERY_OBJECTIVE, ids=named)


@every_objective
def test_the_critic_is_trained_where_there_is_one_and_shares_no_gradient(objective: Objective) -> None:
    work = random_work(objective)
    loss = loss_of(objective, work)
    assert (loss.critic_per_example is not None) == (Role.CRITIC in objective.update_needs)
    if loss.critic_per_example is not None:
        assert gradients(loss_of(objective, work), work.logits)[Role.CRITIC].norm() > 0
        policy, critic = work.logits[Role.POLICY], work.logits[Role.CRITIC]
        crossed = torch.autograd.grad(loss.per_example.sum(), critic, allow_unused=True, retain_graph=True)
        assert crossed + torch.autograd.grad(loss.critic_per_example.sum(), policy, allow_unused=True) == (None, None)


@every_objective
def test_what_speaks_about_no_response_token_changes_nothing(objective: Objective) -> None:
    work = random_work(objective)
    losses, gradient = outcome(objective, work)

    def garbage(logits: Logits, batch: Batch) -> Logits:
        where = {role: read_at(objective.needs[role], batch) for role in logits}
        return {
            r: torch.where(where[r] if z.ndim == 2 else where[r][..., None], z, torch.nan) for r, z in logits.items()
        }

    losses_of_garbage, gradient_of_garbage = outcome(objective, changed(work, lambda batch: batch, garbage))
    for role in losses:
        assert torch.equal(losses[role], losses_of_garbage[role])
        assert torch.equal(gradient[role], gradient_of_garbage[role])
        assert torch.all(gradient[role][~read_at(objective.needs[role], work.batch)] == 0)


@every_objective
def test_more_padding_changes_nothing(objective: Objective) -> None:
    work = random_work(objective)
    losses, gradient = outcome(objective, work)

    def padded(values: Tensor, value: float) -> Tensor:
        return torch.cat([values, torch.full_like(values[:, :1], value).repeat_interleave(3, dim=1)], dim=1)

    def wider(batch: Batch) -> Batch:
        parts = padded(batch.ids_BT, 0), padded(batch.attention_BT, False), padded(batch.response_BT, False)
        return Batch(batch.kind, *parts, batch.label_B)

    wide = changed(work, wider, lambda logits, _: {role: padded(z, 1e9) for role, z in logits.items()})
    losses_of_wide, gradient_of_wide = outcome(objective, wide)
    torch.testing.assert_close(losses_of_wide, losses)
    for role, found in gradient_of_wide.items():
        torch.testing.assert_close(found[:, : gradient[role].shape[1]], gradient[role])
        assert torch.all(found[:, gradient[role].shape[1] :] == 0)


@every_objective
def test_the_order_of_examples_does_not_matter(objective: Objective) -> None:
    work = random_work(objective, examples=4)
    losses, gradient = outcome(objective, work)
    order = [2, 0, 3, 1]
    rows = [row for example in order for row in examples_of(work.batch)[example]]
    moved = changed(
        work, lambda batch: rows_of(batch, rows), lambda logits, _: {role: z[rows] for role, z in logits.items()}
    )
    losses_of_moved, gradient_of_moved = outcome(objective, moved)
    torch.testing.assert_close(losses_of_moved, {role: values[order] for role, values in losses.items()})
    torch.testing.assert_close(gradient_of_moved, {role: values[rows] for role, values in gradient.items()})


@every_objective
def test_micro_batches_of_one_example_add_up_to_the_whole_batch(objective: Objective) -> None:
    """With the means of the whole step, which is what whitening and KTO's reference point are taken from."""
    work = random_work(objective, examples=4)
    works = [take(work, rows) for rows in examples_of(work.batch)]
    whole = loss_of(objective, work)
    parts = [
        plain_loss(objective, w.batch, w.logits, f) for w, f in zip(works, found_in(objective, works), strict=True)
    ]
    each = [losses_of(part) for part in parts]
    torch.testing.assert_close(
        {role: torch.cat([losses[role] for losses in each]) for role in each[0]}, losses_of(whole)
    )
    assert_added_up([part.metrics for part in parts], whole.metrics)
    for name, largest in whole.maxima.items():
        assert max(part.maxima[name] for part in parts) == largest, name
    of_parts = [gradients(part, work.logits) for part in parts]
    for role, gradient in gradients(whole, work.logits).items():
        torch.testing.assert_close(sum(of_part[role] for of_part in of_parts) / len(parts), gradient)


@every_objective
def test_the_first_response_token_is_trained_and_nothing_after_eos(objective: Objective) -> None:
    """But for a score, which is that of the last token."""
    work = random_work(objective, moved=0.01)
    _, gradient = outcome(objective, work)
    for role, values in gradient.items():
        late = objective.update_needs[role] is Need.SCORE
        for row in range(work.batch.rows):
            response = work.batch.response_BT[row].nonzero().flatten()
            first, eos = int(response[0]), int(response[-1])
            assert values[row, eos - 1 + late].norm() > 0
            assert late or values[row, first - 1].norm() > 0
            assert values[row, eos + late :].norm() == 0
            assert not late or values[row, :eos].norm() == 0


@every_objective
def test_a_response_of_eos_alone_has_a_finite_loss_and_gradient(objective: Objective) -> None:
    work = random_work(objective, examples=1)
    assert int(work.batch.response_BT[0].sum()) == 1
    losses, gradient = outcome(objective, work)
    for role in losses:
        assert losses[role].isfinite().all()
        assert gradient[role].isfinite().all()


@every_objective
def test_metrics_are_detached_scalars(objective: Objective) -> None:
    work = random_work(objective)
    loss = loss_of(objective, work)
    assert loss.per_example.shape == (work.batch.examples,)
    for value in [*(part for metric in loss.metrics.values() for part in metric), *loss.maxima.values()]:
        assert value.shape == ()
        assert not value.requires_grad


@every_objective
def test_no_language_model_is_asked_for_where_a_scalar_head_is_trained(objective: Objective) -> None:
    assert objective.is_scalar == (Role.POLICY not in language_roles(objective))
    assert language_roles(objective)[:1] == ([] if objective.is_scalar else [Role.POLICY])


@every_objective
def test_an_objective_comes_back_from_its_own_dump(objective: Objective) -> None:
    assert type(objective).model_validate(objective.model_dump(exclude_unset=True)) == objective
    with pytest.raises(ValueError, match="Extra inputs"):
        type(objective).model_validate({**objective.model_dump(exclude_unset=True), "betta": 0.1})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_objective_is_one_short_file_that_knows_no_other(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem in PROTOCOL or text.count("\n") < 200
    siblings = {f"aligndistil.objectives.{other.stem}" for other in FILES if other.stem not in PROTOCOL}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in siblings
        if isinstance(node, ast.Import):
            assert not siblings & {alias.name for alias in node.names}


def test_every_kind_of_data_is_tried() -> None:
    assert {objective.data for objective in EVERY_OBJECTIVE} == {*DataKind} - {DataKind.PROMPTS}
