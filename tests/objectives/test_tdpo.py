import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import DataKind
from aligndistil.objectives.base import Role
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.tdpo import TDPO, tdpo_loss
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss, plain_terms
from support.responses import Formula, Response, distances, kl

PAIRS = ragged_batch(DataKind.PAIRS, examples=4)
TDPO1 = TDPO(version=1, beta=0.2)
TDPO2 = TDPO(version=2, beta=0.2, alpha=0.5)
LOGITS = random_logits(TDPO2, PAIRS)


def test_losses_worked_out_by_hand():
    # log-ratios 2 and -1, divergences 3 (chosen) and 5 (rejected), beta 0.5: u = 3, K_w - K_l = -2
    sides = {
        "logratio_chosen": torch.tensor([2.0]),
        "logratio_rejected": torch.tensor([-1.0]),
        "kl_chosen": torch.tensor([3.0]),
        "kl_rejected": torch.tensor([5.0]),
    }
    first = tdpo_loss(**sides, beta=0.5, alpha=None)  # margin 0.5 (3 - 2) = 0.5
    second = tdpo_loss(**sides, beta=0.5, alpha=0.25)  # margin 0.5 (3 - 0.25 x 2) = 1.25
    assert float(first) == pytest.approx(math.log1p(math.exp(-0.5)))
    assert float(second) == pytest.approx(math.log1p(math.exp(-1.25)))


@pytest.mark.parametrize("objective", [TDPO1, TDPO2])
def test_a_policy_that_is_the_reference_has_loss_log_2_and_no_divergence(objective):
    start = dict.fromkeys(LOGITS, LOGITS[Role.REFERENCE])
    loss = plain_loss(objective, PAIRS, start)
    values = {"loss": float(loss.per_example.mean())} | means(loss.metrics)
    torch.testing.assert_close(loss.per_example, torch.full((4,), math.log(2)))
    assert objective.first_step()
    for expected in objective.first_step():
        assert values[expected.metric] == pytest.approx(expected.value, abs=1e-12)


def same(first: TDPO, second: DPO | TDPO) -> bool:
    losses = [plain_loss(objective, PAIRS, LOGITS) for objective in (first, second)]
    gradients = [gradient_of(loss, LOGITS[Role.POLICY]) for loss in losses]
    return torch.allclose(losses[0].per_example, losses[1].per_example) and torch.allclose(*gradients)


def test_version_2_without_alpha_is_dpo_and_version_1_is_not():
    assert same(TDPO(version=2, alpha=0, beta=0.2), DPO(beta=0.2))
    assert not same(TDPO1, DPO(beta=0.2))
    assert not same(TDPO1, TDPO(version=2, alpha=1, beta=0.2))


def formula(margin, divergence=lambda ref, policy: kl(ref.logps, policy.logps).sum()) -> Formula:
    """`margin` of u, K_w and K_l; both without beta."""

    def losses(said: dict[str, list[Response]]) -> list[Tensor]:
        both = list(zip(said[Role.REFERENCE], said[Role.POLICY], strict=True))
        ratios = [policy.logp.sum() - ref.logp.sum() for ref, policy in both]
        kls = [divergence(ref, policy) for ref, policy in both]
        sides = zip(ratios[0::2], ratios[1::2], kls[0::2], kls[1::2], strict=True)
        return [(1 + (-0.2 * margin(a - b, k_w, k_l)).exp()).log() for a, b, k_w, k_l in sides]

    return losses


def second(u: Tensor, k_w: Tensor, k_l: Tensor) -> Tensor:
    return u - 0.5 * (k_l - k_w.detach())


RIGHT = {TDPO1: formula(lambda u, k_w, k_l: u - (k_l - k_w)), TDPO2: formula(second)}
WRONG = {
    "the other direction": formula(second, lambda ref, policy: kl(policy.logps, ref.logps).sum()),
    "one position late": formula(second, lambda ref, policy: kl(ref.after, policy.after).sum()),
    "mean over tokens": formula(second, lambda ref, policy: kl(ref.logps, policy.logps).mean()),
    "without EOS": formula(second, lambda ref, policy: kl(ref.logps, policy.logps)[:-1].sum()),
    "of the tokens only": formula(second, lambda ref, policy: (ref.logp - policy.logp).sum()),
    "alpha and version exchanged": formula(lambda u, k_w, k_l: u - (k_l - k_w.detach())),
    "sign": formula(lambda u, k_w, k_l: u + 0.5 * (k_l - k_w.detach())),
    "beta on the log-ratio only": formula(lambda u, k_w, k_l: u - 0.5 * (k_l - k_w.detach()) / 0.2),
}
WRONG_SIDE = {
    "neither is held fixed": formula(lambda u, k_w, k_l: u - 0.5 * (k_l - k_w)),
    "the rejected one is": formula(lambda u, k_w, k_l: u - 0.5 * (k_l.detach() - k_w)),
    "both are": formula(lambda u, k_w, k_l: u - 0.5 * (k_l - k_w).detach()),
}
"""Only the gradient shows these."""


@pytest.mark.parametrize("objective", RIGHT, ids=["version 1", "version 2"])
def test_the_formula_written_out_again_agrees(objective):
    assert max(distances(objective, RIGHT[objective], PAIRS, LOGITS)) < 1e-9


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_would_be_seen(fault):
    assert max(distances(TDPO2, WRONG[fault], PAIRS, LOGITS)) > 1e-4


@pytest.mark.parametrize("fault", WRONG_SIDE)
def test_holding_the_wrong_side_fixed_shows_in_the_gradient_alone(fault):
    loss, gradient = distances(TDPO2, WRONG_SIDE[fault], PAIRS, LOGITS)
    assert loss < 1e-12
    assert gradient > 0.01


def test_a_reference_that_rules_tokens_out_gives_no_nan():
    """In float32 e^-200 is 0, and 0 times its logarithm must not be formed."""
    logits = {role: values.detach().float() for role, values in LOGITS.items()}
    logits[Role.REFERENCE][..., 3:6] = -200
    policy = logits[Role.POLICY].requires_grad_()
    loss = plain_loss(TDPO2, PAIRS, logits)
    assert plain_terms(TDPO2, PAIRS, logits)["kl"].isfinite().all()
    assert gradient_of(loss, policy).isfinite().all()


def test_rewards_are_logged_with_and_without_the_divergence():
    metrics = means(plain_loss(TDPO2, PAIRS, LOGITS).metrics)
    for side in ("chosen", "rejected"):
        added = metrics[f"rewards/{side}_with_kl"] - metrics[f"rewards/{side}"]
        assert added == pytest.approx(0.2 * metrics[f"kl/{side}"])
    assert metrics["kl/margin"] == pytest.approx(metrics["kl/chosen"] - metrics["kl/rejected"])
    dpo = means(plain_loss(DPO(beta=0.2), PAIRS, LOGITS).metrics)
    assert dpo == pytest.approx({name: metrics[name] for name in dpo})


def test_alpha_belongs_to_version_2():
    assert (TDPO().version, TDPO().alpha) == (2, 0.1)
    assert TDPO(version=1).alpha is None
    with pytest.raises(ValidationError, match="`alpha` belongs to version: 2; remove it, or write version: 2"):
        TDPO(version=1, alpha=0.1)


@pytest.mark.parametrize("objective", [TDPO1, TDPO2, TDPO()])
def test_what_is_written_down_is_read_again(objective):
    assert TDPO.model_validate(objective.model_dump()) == objective


@pytest.mark.parametrize("fields", [{"version": 3}, {"beta": 0}, {"alpha": -1}, {"alpha": 0.1, "if_tdpo2": True}])
def test_other_values_are_refused(fields):
    with pytest.raises(ValidationError):
        TDPO(**fields)
