"""What holds for every objective of the registry, whatever its mathematics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from plain import VARIANTS, Logits, gradient_of, named, plain_loss, plain_terms, ragged_batch, random_logits
from torch import Tensor

import aligndistil.objectives
from aligndistil.batch import Batch, DataKind
from aligndistil.objectives import registry
from aligndistil.objectives.base import Objective, Role

OBJECTIVES = [*(cls.example() for cls in registry().values()), *VARIANTS]
FILES = sorted(Path(aligndistil.objectives.__file__).parent.glob("*.py"))
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=named)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return Batch(batch.kind, batch.ids_BT[rows], batch.attention_BT[rows], batch.response_BT[rows], batch.label_B[rows])


def examples_of(batch: Batch) -> list[list[int]]:
    size = batch.rows // batch.examples
    return [list(range(first, first + size)) for first in range(0, batch.rows, size)]


def take(logits: Logits, rows: list[int]) -> Logits:
    return {role: z[rows] for role, z in logits.items()}


def outcome(objective: Objective, batch: Batch, logits: Logits) -> tuple[Tensor, Tensor]:
    """Losses of the examples, and the gradient of their mean in the policy's logits."""
    loss = plain_loss(objective, batch, logits)
    return loss.per_example.detach(), gradient_of(loss, logits[Role.POLICY])


@every_objective
def test_what_is_no_prediction_of_a_response_token_changes_nothing(objective: Objective) -> None:
    batch = ragged_batch(objective.data)
    logits = random_logits(objective, batch)
    losses, gradient = outcome(objective, batch, logits)

    predicts = torch.cat([batch.response_BT[:, 1:], torch.zeros(batch.rows, 1, dtype=torch.bool)], dim=1)
    garbage = {
        role: torch.where(predicts[..., None], z.detach(), torch.nan).requires_grad_() for role, z in logits.items()
    }
    losses_of_garbage, gradient_of_garbage = outcome(objective, batch, garbage)
    assert torch.equal(losses, losses_of_garbage)
    assert torch.equal(gradient, gradient_of_garbage)
    assert torch.all(gradient[~predicts] == 0)


@every_objective
def test_more_padding_changes_nothing(objective: Objective) -> None:
    batch = ragged_batch(objective.data)
    logits = random_logits(objective, batch)
    losses, gradient = outcome(objective, batch, logits)

    def padded(values: Tensor, value: float) -> Tensor:
        return torch.cat([values, torch.full_like(values[:, :3], value)], dim=1)

    wider = Batch(
        batch.kind,
        padded(batch.ids_BT, 0),
        padded(batch.attention_BT, False),
        padded(batch.response_BT, False),
        batch.label_B,
    )
    wide = {role: padded(z.detach(), 1e9).requires_grad_() for role, z in logits.items()}
    losses_of_wide, gradient_of_wide = outcome(objective, wider, wide)
    torch.testing.assert_close(losses_of_wide, losses)
    torch.testing.assert_close(gradient_of_wide[:, : gradient.shape[1]], gradient)
    assert torch.all(gradient_of_wide[:, gradient.shape[1] :] == 0)


@every_objective
def test_the_order_of_examples_does_not_matter(objective: Objective) -> None:
    batch = ragged_batch(objective.data, examples=4)
    logits = random_logits(objective, batch)
    losses, gradient = outcome(objective, batch, logits)
    order = [2, 0, 3, 1]
    rows = [row for example in order for row in examples_of(batch)[example]]
    moved = {role: z.detach()[rows].requires_grad_() for role, z in logits.items()}
    losses_of_moved, gradient_of_moved = outcome(objective, rows_of(batch, rows), moved)
    torch.testing.assert_close(losses_of_moved, losses[order])
    torch.testing.assert_close(gradient_of_moved, gradient[rows])


@every_objective
def test_micro_batches_of_one_example_add_up_to_the_whole_batch(objective: Objective) -> None:
    batch = ragged_batch(objective.data, examples=4)
    logits = random_logits(objective, batch)
    whole = plain_loss(objective, batch, logits)
    parts = [plain_loss(objective, rows_of(batch, rows), take(logits, rows)) for rows in examples_of(batch)]
    accumulated = sum(gradient_of(part, logits[Role.POLICY]) for part in parts) / len(parts)
    torch.testing.assert_close(torch.cat([part.per_example for part in parts]), whole.per_example)
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name].total for part in parts), total, msg=name)
        torch.testing.assert_close(sum(part.metrics[name].count for part in parts), count, msg=name)
    for name, largest in whole.maxima.items():
        assert max(part.maxima[name] for part in parts) == largest, name
    torch.testing.assert_close(accumulated, gradient_of(whole, logits[Role.POLICY]))


@every_objective
def test_the_first_response_token_is_trained_and_nothing_after_eos(objective: Objective) -> None:
    batch = ragged_batch(objective.data)
    _, gradient = outcome(objective, batch, random_logits(objective, batch))
    for row in range(batch.rows):
        response = batch.response_BT[row].nonzero().flatten()
        first, eos = int(response[0]), int(response[-1])
        assert gradient[row, first - 1].norm() > 0
        assert gradient[row, eos - 1].norm() > 0
        assert gradient[row, eos:].norm() == 0


@every_objective
def test_a_response_of_eos_alone_has_a_finite_loss_and_gradient(objective: Objective) -> None:
    batch = ragged_batch(objective.data, examples=1)
    assert int(batch.response_BT[0].sum()) == 1
    losses, gradient = outcome(objective, batch, random_logits(objective, batch))
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@every_objective
@pytest.mark.parametrize("examples", [1, 3])
def test_term_gradient_is_the_derivative_of_the_loss_up_to_one_factor(objective: Objective, examples: int) -> None:
    batch = ragged_batch(objective.data, examples=examples)
    known = objective.term_gradient(batch)
    if known is None:
        pytest.skip("this objective does not know its gradient beforehand")
    terms = {name: t.detach().requires_grad_() for name, t in _some_terms(objective, batch).items()}
    total = objective.loss(batch, terms).per_example.sum()
    arrived = dict(zip(terms, torch.autograd.grad(total, list(terms.values()), allow_unused=True), strict=True))
    name = next(iter(known))
    first = tuple(known[name].nonzero()[0])
    factor = arrived[name][first] / known[name][first]
    assert factor != 0
    for name, gradient in arrived.items():
        expected = factor * known[name] if name in known else torch.zeros(batch.response_BT.shape)
        torch.testing.assert_close(torch.zeros_like(expected) if gradient is None else gradient, expected, msg=name)


@every_objective
def test_metrics_are_detached_scalars(objective: Objective) -> None:
    batch = ragged_batch(objective.data)
    loss = plain_loss(objective, batch, random_logits(objective, batch))
    assert loss.per_example.shape == (batch.examples,)
    for value in [*(part for metric in loss.metrics.values() for part in metric), *loss.maxima.values()]:
        assert value.shape == ()
        assert not value.requires_grad


@every_objective
def test_an_objective_comes_back_from_its_own_dump(objective: Objective) -> None:
    assert type(objective).model_validate(objective.model_dump(exclude_unset=True)) == objective
    with pytest.raises(ValueError, match="Extra inputs"):
        type(objective).model_validate({**objective.model_dump(exclude_unset=True), "betta": 0.1})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_objective_is_one_short_file_that_knows_no_other(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 150
    siblings = {f"aligndistil.objectives.{other.stem}" for other in FILES} - {"aligndistil.objectives.base"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in siblings
        if isinstance(node, ast.Import):
            assert not siblings & {alias.name for alias in node.names}


def _some_terms(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    return plain_terms(objective, batch, random_logits(objective, batch))


def test_every_kind_of_data_is_tried() -> None:
    assert {DataKind.PAIRS, DataKind.RESPONSES} <= {objective.data for objective in OBJECTIVES}
