"""Plausible mistakes in KTO, each far from the golden values of at least one case.

`formula` is the loss written once more, directly on the logits, with one switch for each mistake.
"""

from __future__ import annotations

import pytest
import torch
from case import FOLDER, Case, assert_told_apart
from readers import cases_of
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.objectives.base import Role
from aligndistil.objectives.kto import KTO

PATH = FOLDER / "kto.json"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not in the golden folder")

MISTAKES = [
    "matched responses",
    "not clamped",
    "beta on the log-ratio only",
    "minus log sigmoid",
    "mean of two means",
    "means over tokens",
    "labels exchanged",
    "weights exchanged",
    "without EOS",
    "without the first token",
    "of the policy alone",
]


def golden_cases() -> dict[str, Case]:
    return {case.name: case for case in cases_of(PATH) or [] if isinstance(case, Case)}


def logratios(case: Case, leaf: Tensor, batch: Batch, rows: list[int], mistake: str | None) -> Tensor:
    found = []
    for ids, where, row in zip(batch.ids_BT, batch.response_BT, rows, strict=True):
        at = where.nonzero().flatten()
        at = at[:-1] if mistake == "without EOS" else at[1:] if mistake == "without the first token" else at
        policy, reference = (
            torch.log_softmax(z[row], -1)[at - 1, ids[at]] for z in (leaf, case.logits[Role.REFERENCE])
        )
        ratio = policy if mistake == "of the policy alone" else policy - reference
        found.append(ratio.mean() if mistake == "means over tokens" else ratio.sum())
    return torch.stack(found)


def formula(case: Case, mistake: str | None) -> tuple[float, Tensor]:
    """The loss and its gradient in the policy's logits, of mismatched rows too; with no mistake, the golden ones."""
    objective, label = case.objective, case.batch.label_B
    assert isinstance(objective, KTO)
    assert case.looked_at is not None
    leaf = case.logits[Role.POLICY].clone().requires_grad_()
    ratio = logratios(case, leaf, case.batch, case.order, mistake)
    other = logratios(case, leaf, case.looked_at, case.looked_at_order, mistake)
    z0 = (ratio if mistake == "matched responses" else other).mean()
    if mistake == "clamped one by one":
        z0 = other.clamp(min=0).mean()
    elif mistake != "not clamped":
        z0 = z0.clamp(min=0)
    if mistake != "a reference point with gradient":
        z0 = z0.detach()
    if mistake == "labels exchanged":
        label = ~label
    gain = objective.beta * (ratio - z0) if mistake != "beta on the log-ratio only" else objective.beta * ratio - z0
    gain = torch.where(label, gain, -gain)
    weights = objective.desirable_weight, objective.undesirable_weight
    weight = torch.where(label, *(weights[::-1] if mistake == "weights exchanged" else weights))
    cost = -torch.log(torch.sigmoid(gain)) if mistake == "minus log sigmoid" else 1 - torch.sigmoid(gain)
    losses = weight * cost
    if mistake == "mean of two means":
        loss = torch.stack([losses[of].mean() for of in (label, ~label) if of.any()]).mean()
    else:
        loss = losses.mean()
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


def distances(mistake: str | None) -> dict[str, tuple[float, float]]:
    """From the golden loss and gradient of each case, relatively."""
    found = {}
    for name, case in golden_cases().items():
        assert case.loss is not None
        assert case.gradient is not None
        loss, gradient = formula(case, mistake)
        away = float((gradient - case.gradient).norm() / case.gradient.norm())
        found[name] = abs(loss - case.loss) / case.loss, away
    return found


def test_the_formula_without_a_mistake_is_the_golden_one() -> None:
    assert max(max(pair) for pair in distances(None).values()) < 1e-9


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_moves_the_loss_and_the_gradient(mistake: str) -> None:
    found = distances(mistake).values()
    assert_told_apart(max(loss for loss, _ in found), f"loss with {mistake}")
    assert_told_apart(max(gradient for _, gradient in found), f"gradient with {mistake}")


def test_a_reference_point_with_gradient_shows_in_the_gradient_alone() -> None:
    found = distances("a reference point with gradient").values()
    assert max(loss for loss, _ in found) < 1e-12
    assert_told_apart(max(gradient for _, gradient in found), "a reference point with gradient")


def test_a_clamp_of_each_sample_shows_only_where_samples_are_on_both_sides_of_zero() -> None:
    found = distances("clamped one by one")
    seen = 0.0
    for name, case in golden_cases().items():
        assert case.looked_at is not None
        ratio = logratios(case, case.logits[Role.POLICY], case.looked_at, case.looked_at_order, None)
        if ratio.min() < 0 < ratio.max():
            seen = max(seen, *found[name])
        else:
            assert max(found[name]) < 1e-12, name
    assert_told_apart(seen, "a clamp of each sample")


def test_mismatched_rows_have_no_gradient() -> None:
    for name, case in golden_cases().items():
        assert case.gradient is not None
        assert torch.all(case.gradient[case.looked_at_order] == 0), name
        gradient = formula(case, None)[1]
        assert torch.all(gradient[case.looked_at_order] == 0), name
        assert gradient[case.order].norm() > 0, name
