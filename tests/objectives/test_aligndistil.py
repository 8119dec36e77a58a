from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.maths import kl_divergence
from aligndistil.objectives.aligndistil import AlignDistil, adaptive_alpha, extrapolated_logps
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss, plain_terms

CONTRASTIVE, VANILLA = AlignDistil(r=5.0), AlignDistil(reward="vanilla", r=5.0)
CONSTANT = AlignDistil(weight="constant", beta0=0.1, beta=0.08)
VANILLA_CONSTANT = AlignDistil(reward="vanilla", weight="constant", beta0=0.1, beta=0.08)
variants = pytest.mark.parametrize("objective", [CONTRASTIVE, VANILLA, CONSTANT, VANILLA_CONSTANT])


def metrics_of(objective: Objective, batch: Batch, logits: dict[str, Tensor]) -> dict[str, float]:
    return means(plain_loss(objective, batch, logits).metrics)


def other_role(objective: AlignDistil) -> Role:
    return next(role for role in objective.needs if role not in (Role.POLICY, Role.TEACHER))


def logps(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


@variants
def test_a_constant_on_all_logits_changes_nothing(objective: AlignDistil) -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(objective, batch)
    loss = plain_loss(objective, batch, logits)
    shift = torch.randn(*batch.ids_BT.shape, 1) * 10
    shifted = {role: z + shift for role, z in logits.items()}
    torch.testing.assert_close(plain_loss(objective, batch, shifted).per_example, loss.per_example)


@variants
def test_a_student_at_the_target_has_neither_loss_nor_gradient(objective: AlignDistil) -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(objective, batch)
    terms = plain_terms(objective, batch, logits)
    teacher, other = logps(logits[Role.TEACHER]), logps(logits[other_role(objective)])
    alpha = torch.zeros(batch.ids_BT.shape)
    alpha[:, :-1] = terms["alpha"][:, 1:]
    contrastive = objective.reward == "contrastive"
    target = extrapolated_logps(teacher_logps=teacher, other_logps=other, alpha=alpha, contrastive=contrastive)
    at_target = {**logits, Role.POLICY: (target + 3.0).requires_grad_()}
    loss = plain_loss(objective, batch, at_target)
    assert loss.per_example.abs().max() < 1e-12
    assert gradient_of(loss, at_target[Role.POLICY]).abs().max() < 1e-12


def test_the_targets_of_both_rewards_by_hand() -> None:
    # Two tokens; log-odds 2 of the teacher and -1 of the other, alpha = 0.5.
    # Contrastive: 2 + 0.5 (2 - (-1)) = 3.5; vanilla: 0.5 * 2 + 0.5 * (-1) = 0.5.
    teacher, other, alpha = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([0.5])
    for contrastive, expected in ((True, 3.5), (False, 0.5)):
        target = extrapolated_logps(teacher_logps=teacher, other_logps=other, alpha=alpha, contrastive=contrastive)
        assert float(target[0, 0] - target[0, 1]) == pytest.approx(expected)


def test_the_loss_of_one_token_by_hand() -> None:
    # TVD of (3/4, 1/4) and (1/4, 3/4) is 1/2; r = 1.5 and eps = 0.25 give alpha = 1 and beta_t = 0.1.
    # Target odds 3 * (3 / (1/3)) = 27; a uniform student has KL = log(1/2) - (log(27/28) + log(1/28)) / 2.
    batch = collate([Row([0], [1])], DataKind.RESPONSES, pad_id=0)
    odds = {Role.POLICY: 1.0, Role.TEACHER: 3.0, Role.REVERSE_TEACHER: 1 / 3}
    logits = {role: torch.tensor([[[math.log(ratio), 0.0], [0.0, 0.0]]]) for role, ratio in odds.items()}
    objective = AlignDistil(beta0=0.1, r=1.5, eps=0.25)
    terms = plain_terms(objective, batch, logits)
    assert {name: float(terms[name][0, 1]) for name in ("tvd", "alpha", "beta")} == pytest.approx(
        {"tvd": 0.5, "alpha": 1.0, "beta": 0.1}
    )
    kl = -math.log(2) - (math.log(27 / 28) + math.log(1 / 28)) / 2
    assert float(plain_loss(objective, batch, logits).per_example) == pytest.approx(0.1 * kl)
    # the token is the second of the two: reward 0.1 (log 1/4 - log 3/4) = -0.1 log 3, expected reward 0 by symmetry
    assert float(terms["reward"][0, 1]) == pytest.approx(-0.1 * math.log(3))
    assert float(terms["expected_reward"][0, 1]) == pytest.approx(0.0, abs=1e-12)
    both = {role: logps(z[0, :1]) for role, z in logits.items()}
    target = objective.target_logps(TokenChunk(torch.tensor([1]), {}, both))
    assert target.exp().tolist()[0] == pytest.approx([27 / 28, 1 / 28])


def test_alpha_runs_from_eps_to_r_plus_eps() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    objective = AlignDistil(r=5.0, eps=0.01)
    logits = random_logits(objective, batch)
    alpha = plain_terms(objective, batch, logits)["alpha"][batch.response_BT]
    assert ((alpha >= 0.01) & (alpha <= 5.01)).all()

    where = torch.arange(11) < 5
    disjoint = {
        **logits,
        Role.TEACHER: torch.where(where, 0.0, -800.0).expand_as(logits[Role.POLICY]),
        Role.REVERSE_TEACHER: torch.where(where, -800.0, 0.0).expand_as(logits[Role.POLICY]),
    }
    terms = plain_terms(objective, batch, disjoint)
    torch.testing.assert_close(terms["tvd"][batch.response_BT], torch.ones(batch.response_BT.sum()))
    torch.testing.assert_close(terms["alpha"][batch.response_BT], torch.full((int(batch.response_BT.sum()),), 5.01))
    assert plain_loss(objective, batch, disjoint).per_example.isfinite().all()


def test_agreeing_teachers_weigh_beta0_over_eps() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    objective = AlignDistil(beta0=0.1, r=15.0, eps=0.001)
    logits = random_logits(objective, batch)
    logits[Role.REVERSE_TEACHER] = logits[Role.TEACHER]
    terms = plain_terms(objective, batch, logits)
    torch.testing.assert_close(terms["beta"][batch.response_BT], torch.full((int(batch.response_BT.sum()),), 100.0))
    torch.testing.assert_close(terms["weighted_kl"], 100 * terms["kl_teacher"])


def test_without_slope_the_target_is_close_to_the_dpo_model() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    objective = AlignDistil(beta0=0.1, r=0.0, eps=0.001)
    terms = plain_terms(objective, batch, random_logits(objective, batch))
    torch.testing.assert_close(terms["beta"][batch.response_BT], torch.full((int(batch.response_BT.sum()),), 100.0))
    torch.testing.assert_close(terms["kl_target"], terms["kl_teacher"], rtol=0.02, atol=0.02)


def test_a_constant_weight_without_extrapolation_has_the_dpo_model_as_its_target() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    objective = AlignDistil(weight="constant", beta0=1e-12, beta=1.0)  # rho = beta0 / beta -> 0
    terms = plain_terms(objective, batch, random_logits(objective, batch))
    torch.testing.assert_close(terms["weighted_kl"], terms["kl_teacher"])
    vanilla = AlignDistil(reward="vanilla", weight="constant", beta0=0.3, beta=0.3)  # rho = 1: the DPO model as well
    terms = plain_terms(vanilla, batch, random_logits(vanilla, batch))
    torch.testing.assert_close(terms["weighted_kl"], 0.3 * terms["kl_teacher"])


@pytest.mark.parametrize("objective", [CONTRASTIVE, CONSTANT])
def test_the_loss_is_a_kl_to_the_dpo_model_minus_the_expected_reward(objective: AlignDistil) -> None:
    # w KL(p || p*) = w KL(p || p_dpo) - beta0 E_p[log p_dpo / p_rev] + w log Z, Z = sum p_dpo^(1 + alpha) / p_rev^alpha
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(objective, batch)
    terms = plain_terms(objective, batch, logits)
    where = batch.response_BT
    teacher, reverse = (logps(logits[role][:, :-1][where[:, 1:]]) for role in (Role.TEACHER, Role.REVERSE_TEACHER))
    w, alpha = terms["beta"][where], terms["alpha"][where]
    log_z = (teacher + alpha[:, None] * (teacher - reverse)).logsumexp(-1)
    right = w * terms["kl_teacher"][where] - terms["expected_reward"][where] + w * log_z
    torch.testing.assert_close(terms["weighted_kl"][where], right)


def test_nothing_flows_into_the_frozen_models_or_the_weights() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(CONTRASTIVE, batch)
    terms = plain_terms(CONTRASTIVE, batch, logits)
    assert [name for name, term in terms.items() if term.requires_grad] == ["weighted_kl"]


def test_the_gradient_in_the_logits_is_the_derived_one() -> None:
    # d KL / d z = p (log p - log p* - KL)
    batch = collate([Row([2], [3])], DataKind.RESPONSES, pad_id=0)
    logits = random_logits(CONSTANT, batch)
    p, teacher, reverse = (logps(logits[r].detach()[0, 0]) for r in (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER))
    target = logps(teacher + 1.25 * (teacher - reverse))
    expected = 0.08 * p.exp() * (p - target - kl_divergence(p, target))
    gradient = gradient_of(plain_loss(CONSTANT, batch, logits), logits[Role.POLICY])
    torch.testing.assert_close(gradient[0, 0], expected)


def test_the_token_mean_reward_does_not_change_when_every_token_comes_twice() -> None:
    once = collate([Row([2, 3], [4, 5, 1])], DataKind.RESPONSES, pad_id=0)
    twice = collate([Row([2, 3], [4, 4, 5, 5, 1, 1])], DataKind.RESPONSES, pad_id=0)
    logits = random_logits(CONTRASTIVE, once)
    repeated = {role: z[:, [0, 1, 1, 2, 2, 3, 3, 4]] for role, z in logits.items()}
    short, long = metrics_of(CONTRASTIVE, once, logits), metrics_of(CONTRASTIVE, twice, repeated)
    assert short["reward/token_mean"] == pytest.approx(long["reward/token_mean"])
    assert 2 * short["reward/sequence"] == pytest.approx(long["reward/sequence"])


def test_the_kl_of_the_teacher_to_itself_is_zero() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(CONTRASTIVE, batch)
    logits[Role.POLICY] = logits[Role.TEACHER]
    metrics = metrics_of(CONTRASTIVE, batch, logits)
    assert metrics["kl/policy_teacher"] == metrics["kl/policy_teacher_token"] == 0.0
    assert metrics["kl/policy_target"] > 0


def test_the_share_of_the_loss_at_small_alpha() -> None:
    batch = collate([Row([2], [3, 1])], DataKind.RESPONSES, pad_id=0)
    terms = {
        name: torch.zeros(1, 3) for name in ("reward", "expected_reward", "kl_teacher", "kl_target", "beta", "tvd")
    }
    terms["alpha"] = torch.tensor([[0.0, 0.002, 0.5]])
    terms["weighted_kl"] = torch.tensor([[0.0, 3.0, 1.0]])
    assert means(CONTRASTIVE.loss(batch, terms).metrics)["loss/small_alpha_share"] == pytest.approx(3 / 4)


def test_metrics_worked_out_by_hand() -> None:
    """Responses of two tokens and of one; what stands at the prompts and at the padding belongs to none."""
    batch = collate([Row([2], [3, 1]), Row([2], [1])], DataKind.RESPONSES, pad_id=0)
    rows = {
        "weighted_kl": [[9.0, 3.0, 1.0], [9.0, 4.0, 9.0]],
        "kl_target": [[9.0, 6.0, 8.0], [9.0, 2.0, 9.0]],
        "kl_teacher": [[9.0, 1.0, 5.0], [9.0, 4.0, 9.0]],
        "reward": [[9.0, 2.0, -1.0], [9.0, -3.0, 9.0]],
        "expected_reward": [[9.0, 4.0, 1.0], [9.0, -1.0, 9.0]],
        "tvd": [[0.9, 0.125, 0.375], [0.9, 0.75, 0.9]],
        "alpha": [[90.0, 2.0, 6.0], [90.0, 12.0, 90.0]],
        "beta": [[90.0, 0.5, 0.25], [90.0, 0.125, 90.0]],
    }
    loss = CONTRASTIVE.loss(batch, {name: torch.tensor(values) for name, values in rows.items()})
    assert loss.per_example.tolist() == [(3 + 1) / 2, 4]
    assert means(loss.metrics) == {
        "reward/token_mean": ((2 - 1) / 2 - 3) / 2,
        "reward/sequence": ((2 - 1) - 3) / 2,
        "reward/expected": ((4 + 1) - 1) / 2,
        "kl/policy_teacher": ((1 + 5) + 4) / 2,
        "kl/policy_teacher_token": ((1 + 5) / 2 + 4) / 2,
        "kl/policy_target": ((6 + 8) + 2) / 2,
        "tvd/mean": ((0.125 + 0.375) / 2 + 0.75) / 2,
        "alpha/mean": ((2 + 6) / 2 + 12) / 2,
        "beta_t/mean": ((0.5 + 0.25) / 2 + 0.125) / 2,
        "loss/small_alpha_share": 0,
    }
    assert {name: float(value) for name, value in loss.maxima.items()} == {"tvd/max": 0.75, "alpha/max": 12}


@pytest.mark.parametrize(
    ("alpha", "share"),
    [
        ([0.0099, 0.5, 0.002], (3 / 4 + 1) / 2),  # 3 of 3 + 1, and 2 of 2
        ([0.5, 0.0099, 0.5], (1 / 4 + 0) / 2),
        ([0.01, 0.0101, 0.01], 0),  # small is below 0.01
    ],
)
def test_the_share_at_small_alpha_is_that_of_each_response(alpha: list[float], share: float) -> None:
    batch = collate([Row([2], [3, 1]), Row([2], [1])], DataKind.RESPONSES, pad_id=0)
    terms = dict.fromkeys(("reward", "expected_reward", "kl_teacher", "kl_target", "beta", "tvd"), torch.zeros(2, 3))
    terms["alpha"] = torch.tensor([[0.0, alpha[0], alpha[1]], [0.0, alpha[2], 0.0]])
    for scale in (1.0, 1e-9):
        terms["weighted_kl"] = torch.tensor([[0.0, 3.0, 1.0], [0.0, 2.0, 0.0]]) * scale
        assert means(CONTRASTIVE.loss(batch, terms).metrics)["loss/small_alpha_share"] == pytest.approx(share)


def test_a_loss_of_zero_has_no_share_at_small_alpha() -> None:
    batch = collate([Row([2], [1])], DataKind.RESPONSES, pad_id=0)
    names = ("reward", "expected_reward", "kl_teacher", "kl_target", "beta", "tvd", "alpha", "weighted_kl")
    metrics = CONTRASTIVE.loss(batch, dict.fromkeys(names, torch.zeros(1, 2))).metrics
    assert means(metrics)["loss/small_alpha_share"] == 0


def test_a_constant_weight_leaves_the_distance_of_the_teachers_as_it_is() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(CONTRASTIVE, batch)
    constant, adaptive = (plain_terms(objective, batch, logits) for objective in (CONSTANT, CONTRASTIVE))
    torch.testing.assert_close(constant["tvd"], adaptive["tvd"])
    where = batch.response_BT
    torch.testing.assert_close(constant["alpha"][where], torch.full((int(where.sum()),), 0.1 / 0.08))


def test_which_models_are_needed() -> None:
    assert AlignDistil().needs == dict.fromkeys((Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER), Need.DISTRIBUTION)
    assert VANILLA.needs == dict.fromkeys((Role.POLICY, Role.TEACHER, Role.REFERENCE), Need.DISTRIBUTION)


def test_adaptive_alpha_by_hand() -> None:
    alpha = adaptive_alpha(tvd=torch.tensor([0.0, 0.2, 1.0]), r=15.0, eps=0.001)
    assert alpha.tolist() == pytest.approx([0.001, 3.001, 15.001])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "constant"}, "needs `beta`"),
        ({"weight": "constant", "beta": 0.08, "r": 5.0}, "does not use r; remove it"),
        ({"weight": "constant", "beta": 0.08, "eps": 0.1, "r": 1}, "does not use eps, r; remove it"),
        ({"beta": 0.08}, "belongs to weight: constant"),
        ({"beta0": 0}, "greater than 0"),
        ({"eps": 0}, "greater than 0"),
        ({"r": -1}, "greater than or equal to 0"),
        ({"reward": "reverse"}, "'contrastive' or 'vanilla'"),
    ],
)
def test_fields_that_make_no_sense_together_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlignDistil.model_validate(fields)
