"""Plausible mistakes in AlignDistil, each far from the golden values: what the golden tests can see.

`formula` is the loss written once more, directly on the logits, with one switch for each mistake.
"""

from __future__ import annotations

import pytest
import torch
from case import FOLDER, Case, assert_told_apart
from readers import cases_of
from torch import Tensor

from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Role

PATH = FOLDER / "aligndistil_offpolicy.json"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not in the golden folder")

MISTAKES = [
    "tvd without the factor 1/2",
    "beta outside the token sum",
    "mean over all tokens",
    "sum over tokens",
    "forward KL",
    "tvd against the student",
    "unshifted",
    "first response token dropped",
]


def golden_case() -> Case:
    """The first with both of what the paper adds: the contrastive reward and the adaptive weight."""
    fields = {"reward": "contrastive", "weight": "adaptive"}
    return next(case for case in cases_of(PATH) or [] if fields.items() <= case.objective.model_dump().items())


def formula(case: Case, mistake: str | None) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the policy's logits; with no mistake, the golden ones."""
    objective = case.objective
    assert isinstance(objective, AlignDistil)
    leaf = case.logits[Role.POLICY].clone().requires_grad_()
    policy, teacher, reverse = (
        torch.log_softmax(z, -1) for z in (leaf, case.logits[Role.TEACHER], case.logits[Role.REVERSE_TEACHER])
    )
    # here, and only here, a value stands at the position that predicts
    where = case.batch.response_BT.roll(-1, dims=1)
    where[:, -1] = False
    if mistake == "unshifted":
        where = case.batch.response_BT
    if mistake == "first response token dropped":
        where = where & where.roll(1, dims=1)
    other = policy.detach() if mistake == "tvd against the student" else reverse
    tvd = (teacher.exp() - other.exp()).abs().sum(-1) / (1 if mistake == "tvd without the factor 1/2" else 2)
    alpha = objective.r * tvd + objective.eps
    beta = objective.beta0 / alpha
    target = torch.log_softmax(teacher + alpha[..., None] * (teacher - reverse), -1)
    if mistake == "forward KL":
        kl = (target.exp() * (target - policy)).sum(-1)
    else:
        kl = (policy.exp() * (policy - target)).sum(-1)
    lengths = where.sum(-1)
    weighted = beta * kl * where
    if mistake == "beta outside the token sum":
        loss = ((beta * where).sum(-1) / lengths * (kl * where).sum(-1) / lengths).mean()
    elif mistake == "mean over all tokens":
        loss = weighted.sum() / lengths.sum()
    elif mistake == "sum over tokens":
        loss = weighted.sum(-1).mean()
    else:
        loss = (weighted.sum(-1) / lengths).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_the_formula_without_a_mistake_is_the_golden_one() -> None:
    case = golden_case()
    loss, gradient = formula(case, None)
    assert float(loss) == pytest.approx(case.loss, rel=1e-9)
    torch.testing.assert_close(gradient, case.gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_moves_the_loss_and_the_gradient(mistake: str) -> None:
    case = golden_case()
    assert case.loss is not None
    assert case.gradient is not None
    loss, gradient = formula(case, mistake)
    assert_told_apart(abs(float(loss) - case.loss) / case.loss, f"loss with {mistake}")
    assert_told_apart(float((gradient - case.gradient).norm() / case.gradient.norm()), f"gradient with {mistake}")
