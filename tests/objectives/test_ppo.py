import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from aligndistil.batch import DataKind, Row, collate
from aligndistil.maths import kl_divergence, sum_tokens
from aligndistil.objectives.base import Need, OnPolicy, Prepares, Role
from aligndistil.objectives.ppo import PPO
from support.micro_batches import found_in, loss_of, random_work
from support.plain_formula import critic_gradient_of, gradient_of, means, plain_loss, plain_preparation, step_means

OBJECTIVE = PPO(kl_coef=0.5, gae_lambda=1.0, reward_clip=10.0)
BATCH = collate([Row([5], [6, 7, 1]), Row([5], [1])], DataKind.RESPONSES, pad_id=0)
ROLLOUT = {
    name: torch.tensor(rows, dtype=torch.float64)
    for name, rows in {
        "logp": [[0.0, -1.0, -2.0, -3.0], [0.0, -1.0, 0.0, 0.0]],
        "kl_sampled": [[0.0, 2.0, 0.0, -2.0], [0.0, 4.0, 0.0, 0.0]],
        "kl": [[0.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]],
        "reward_score": [[0.0, 50.0, 60.0, 25.0], [0.0, 3.0, 0.0, 0.0]],
        "critic_value": [[0.0, 7.0, 8.0, 9.0], [0.0, -1.0, 0.0, 0.0]],
    }.items()
}
"""Token rewards -0.5 k: -1, 0, 1 + 10 (25 is cut), and -2 + 3. Returns 10, 11, 11 and 1; advantages 3, 3, 2 and 2."""


def test_a_rollout_worked_out_by_hand():
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    assert prepared.terms["advantage"].tolist() == [[0, 3, 3, 2], [0, 2, 0, 0]]
    assert prepared.terms["return"].tolist() == [[0, 10, 11, 11], [0, 1, 0, 0]]
    assert torch.equal(prepared.terms["old_logp"], ROLLOUT["logp"])
    assert torch.equal(prepared.terms["old_value"], ROLLOUT["critic_value"])
    assert means(prepared.metrics) == pytest.approx(
        {
            "objective/scores": 14,
            "objective/scores_clipped": 0.5,
            "objective/rewards": (10 + 1) / 2,
            "objective/rewards_kl": (0 - 2) / 2,
            "objective/rewards_score": (10 + 3) / 2,
            "objective/kl": (0 + 4) / 2,
            "objective/kl_token": (0 + 4) / 2,
            "objective/kl_coef": 0.5,
            "kl/policy_reference": (3 + 5) / 2,
            "advantages/mean": 10 / 4,
            "advantages/square": 26 / 4,
            "returns/mean": 33 / 4,
            "returns/square": 343 / 4,
        }
    )


def test_an_update_worked_out_by_hand():
    # advantages 3, 3, 2, 2 have mean 2.5 and deviation 0.5: whitened 1, 1, -1, -1
    # ratios 1.5 (held at 1.2), 1, 0.5 (held at 0.8) and 1: first row -(1.2 + 1 - 0.8) / 3, second row 1
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    moved = torch.tensor([[0.0, math.log(1.5), 0.0, math.log(0.5)], [0.0, 0.0, 0.0, 0.0]])
    # values 7.1 (error 2.9), 8.5 (held at 8.2: error 2.8), 9 (error 2), and -1 (error 2)
    value = torch.tensor([[0.0, 7.1, 8.5, 9.0], [0.0, -1.0, 0.0, 0.0]])
    terms = {"logp": ROLLOUT["logp"] + moved, "critic_value": value, **prepared.terms, **step_means([prepared])}
    loss = OBJECTIVE.loss(BATCH, terms)
    policy = [-1.4 / 3, 1.0]
    critic = [(2.9**2 + 2.8**2 + 4) / 6, 2.0]
    assert loss.per_example.tolist() == pytest.approx(policy)
    assert loss.critic_per_example.tolist() == pytest.approx(critic)
    assert means(loss.metrics) == pytest.approx(
        {
            "loss/policy": sum(policy) / 2,
            "loss/value": sum(critic) / 2,
            "policy/clip_fraction": 2 / 4,
            "policy/approx_kl": (0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 4,
            "value/explained_variance": 1 - (26 / 4 - 2.5**2) / (343 / 4 - (33 / 4) ** 2),
        }
    )
    assert float(loss.maxima["policy/ratio_max"]) == pytest.approx(1.5)


def test_a_score_is_clipped_at_both_ends():
    # -25 and 3 against 10: one of the two; 25 and -25: both
    for scores, fraction in (((-25.0, 3.0), 0.5), ((25.0, -25.0), 1.0), ((10.0, -10.0), 0.0)):
        score = torch.tensor([[0.0, 0.0, 0.0, scores[0]], [0.0, scores[1], 0.0, 0.0]])
        metrics = means(OBJECTIVE.prepare(BATCH, {**ROLLOUT, "reward_score": score}, OBJECTIVE.initial_state()).metrics)
        assert metrics["objective/scores_clipped"] == fraction
        assert metrics["objective/scores"] == sum(scores) / 2


def test_only_tokens_that_gain_from_leaving_the_clip_range_count_as_clipped():
    # whitened advantages 1, 1, -1 and, in the other row, -1, as above
    # ratios 0.5 (a loss: it may come back), 1.5 (held at 1.2), 1.5 (a loss), and 1: one of four
    # before whitening all advantages are positive: the second and the third would count
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    moved = torch.tensor([[0.0, math.log(0.5), math.log(1.5), math.log(1.5)], [0.0, 0.0, 0.0, 0.0]])
    terms = {**prepared.terms, **step_means([prepared]), "critic_value": ROLLOUT["critic_value"]}
    loss = OBJECTIVE.loss(BATCH, {**terms, "logp": ROLLOUT["logp"] + moved})
    assert [float(part) for part in loss.metrics["policy/clip_fraction"]] == [1, 4]
    assert loss.per_example.tolist() == pytest.approx([-(0.5 + 1.2 - 1.5) / 3, 1.0])
    # rho - 1 - log rho: -0.5 - log 0.5, twice 0.5 - log 1.5, and 0
    approx_kl = (-0.5 - math.log(0.5) + 2 * (0.5 - math.log(1.5))) / 4
    assert means(loss.metrics)["policy/approx_kl"] == pytest.approx(approx_kl)


def test_discount_and_lambda_are_those_of_the_objective():
    # rewards -1, 0, 11 and values 7, 8, 9: errors -1 + 4 - 7, 0 + 4.5 - 8 and 11 - 9, each and 1/4 of what follows
    objective = PPO(kl_coef=0.5, gamma=0.5, gae_lambda=0.5)
    prepared = objective.prepare(BATCH, ROLLOUT, objective.initial_state())
    assert prepared.terms["advantage"].tolist() == [[0, -4.75, -3, 2], [0, 2, 0, 0]]


def test_policy_and_critic_are_clipped_by_their_own_ranges():
    # as above: ratios 1.5 (held at 1.1), 1, 0.5 (held at 0.9), and 1; whitened advantages 1, 1, -1 and -1
    # values 7.1 (error 2.9), 8.5 (error 2.5, as they may move by 1) and 9 (error 2); and -1 (error 2)
    objective = PPO(kl_coef=0.5, gae_lambda=1.0, clip_range=0.1, value_clip_range=1.0)
    prepared = objective.prepare(BATCH, ROLLOUT, objective.initial_state())
    moved = torch.tensor([[0.0, math.log(1.5), 0.0, math.log(0.5)], [0.0, 0.0, 0.0, 0.0]])
    value = torch.tensor([[0.0, 7.1, 8.5, 9.0], [0.0, -1.0, 0.0, 0.0]])
    terms = {"logp": ROLLOUT["logp"] + moved, "critic_value": value, **prepared.terms, **step_means([prepared])}
    loss = objective.loss(BATCH, terms)
    assert loss.per_example.tolist() == pytest.approx([-(1.1 + 1 - 0.9) / 3, 1.0])
    assert loss.critic_per_example.tolist() == pytest.approx([(2.9**2 + 2.5**2 + 4) / 6, 2.0])
    assert means(loss.metrics)["policy/clip_fraction"] == 2 / 4


def test_numbers_off_the_response_reach_neither_returns_nor_metrics():
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    off = ~BATCH.response_BT
    elsewhere = {name: torch.where(off, 7.0, values) for name, values in ROLLOUT.items()}
    moved = OBJECTIVE.prepare(BATCH, elsewhere, OBJECTIVE.initial_state())
    assert means(moved.metrics) == pytest.approx(means(prepared.metrics))
    for name in ("advantage", "return"):
        assert torch.equal(moved.terms[name], prepared.terms[name])
    terms = {**prepared.terms, **step_means([prepared]), "critic_value": ROLLOUT["critic_value"]}
    loss = OBJECTIVE.loss(BATCH, {**terms, "logp": torch.where(off, 5.0, ROLLOUT["logp"])})
    assert float(loss.maxima["policy/ratio_max"]) == 1
    assert means(loss.metrics)["policy/approx_kl"] == means(loss.metrics)["policy/clip_fraction"] == 0


def test_the_sampled_kl_is_logged_by_response_and_by_token():
    # responses of three tokens and of one: sums 6 and 4, means 2 and 4
    kl = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 0.0, 0.0]])
    metrics = means(OBJECTIVE.prepare(BATCH, {**ROLLOUT, "kl_sampled": kl}, OBJECTIVE.initial_state()).metrics)
    assert (metrics["objective/kl"], metrics["objective/kl_token"]) == (5, 3)
    assert metrics["kl/policy_reference"] == 4, "that of the vocabulary is another number"


@pytest.mark.parametrize(
    ("returns", "explained"),
    [
        (4e-4, 0.75),  # 1 - 1e-4 / 4e-4
        (5e-5, -1.0),  # worse than a constant
        (2e-8, 1 - 1e-4 / 2e-8),
        (5e-9, None),  # below 1e-8 returns do not vary
    ],
)
def test_the_explained_variance_of_returns_of_small_variance(returns, explained):
    # both means are 0, so that a mean of squares is a variance
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    over_step = {"advantages/mean": 0.0, "advantages/square": 1e-4, "returns/mean": 0.0, "returns/square": returns}
    terms = {**ROLLOUT, **prepared.terms, **{name: torch.tensor(value) for name, value in over_step.items()}}
    total, count = OBJECTIVE.loss(BATCH, terms).metrics["value/explained_variance"]
    if explained is None:
        assert (float(total), float(count)) == (0, 0)
    else:
        assert float(total / count) == pytest.approx(explained)


def test_returns_that_are_all_the_same_leave_nothing_to_explain():
    prepared = OBJECTIVE.prepare(BATCH, ROLLOUT, OBJECTIVE.initial_state())
    over_step = {**step_means([prepared]), "returns/mean": torch.tensor(3.0), "returns/square": torch.tensor(9.0)}
    metrics = OBJECTIVE.loss(BATCH, {**ROLLOUT, **prepared.terms, **over_step}).metrics
    assert [float(part) for part in metrics["value/explained_variance"]] == [0, 0]


def test_the_first_update_of_a_rollout_has_minus_the_whitened_advantage_by_the_length_as_its_gradient():
    """Where policy and critic are still those that sampled: rho = 1, and the critic goes towards the returns."""
    work = random_work(OBJECTIVE, moved=0.0)
    found = found_in(OBJECTIVE, [work])[0]
    where, length, rows = work.batch.response_BT, work.batch.length_B, work.batch.rows
    leaf = found["old_logp"].clone().requires_grad_()
    value = found["old_value"].clone().requires_grad_()
    loss = OBJECTIVE.loss(work.batch, {**found, "logp": leaf, "critic_value": value})
    advantage = found["advantage"][where]
    white = torch.zeros(where.shape).masked_scatter(where, (advantage - advantage.mean()) / advantage.std(correction=0))
    torch.testing.assert_close(gradient_of(loss, leaf), -white / length[:, None] / rows)
    torch.testing.assert_close(critic_gradient_of(loss, value), -found["advantage"] / length[:, None] / rows)
    for name in ("policy/clip_fraction", "policy/approx_kl"):
        assert float(loss.metrics[name].total) == 0
    assert float(loss.maxima["policy/ratio_max"]) == 1


def test_advantages_are_whitened_over_the_whole_rollout_and_returns_are_not():
    """Two micro-batches of one step, of which one was good and one bad: whitened apart, neither would be."""
    works = []
    for seed, score in enumerate((8.0, -8.0)):
        work = random_work(OBJECTIVE, seed=seed)
        before = {**work.before, Role.REWARD: torch.full_like(work.before[Role.REWARD], score)}
        works.append(replace(work, before=before))
    founds = found_in(OBJECTIVE, works)
    everything = torch.cat([f["advantage"][w.batch.response_BT] for f, w in zip(founds, works, strict=True)])
    assert float(founds[0]["advantages/mean"]) == pytest.approx(float(everything.mean()))
    sums = []
    for work, found in zip(works, founds, strict=True):
        leaf = found["old_logp"].clone().requires_grad_()
        loss = plain_loss(OBJECTIVE, work.batch, work.logits, {**found, "logp": leaf})
        weight = -gradient_of(loss, leaf) * work.batch.length_B[:, None] * work.batch.rows
        expected = (found["advantage"] - everything.mean()) / everything.std(correction=0) * work.batch.response_BT
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(found["return"], found["advantage"] + found["old_value"])
        sums.append(float(weight.sum()))
    assert sums[0] > 1 > -1 > sums[1]


def test_the_reward_is_on_the_last_token_and_the_kl_on_every_one():
    """With lambda 1 and no critic, what is left at the first token is the score less the KL of the response."""
    objective = PPO(kl_coef=0.3, gae_lambda=1.0, reward_clip=None)
    work = random_work(objective)
    before = {**work.before, Role.CRITIC: torch.zeros_like(work.before[Role.CRITIC])}
    prepared = plain_preparation(objective, work.batch, before)
    for row, where in enumerate(work.batch.response_BT):
        at = where.nonzero().flatten()
        logp, ref_logp = (
            torch.log_softmax(before[role][row].detach(), -1)[at - 1, work.batch.ids_BT[row, at]]
            for role in (Role.POLICY, Role.REFERENCE)
        )
        score = before[Role.REWARD][row, at[-1]]
        expected = score - 0.3 * (logp - ref_logp).sum()
        torch.testing.assert_close(prepared.terms["return"][row, at[0]], expected)
        torch.testing.assert_close(prepared.terms["return"][row, at[-1]], score - 0.3 * (logp - ref_logp)[-1])


def test_the_logged_kl_is_that_of_the_whole_vocabulary():
    work = random_work(OBJECTIVE)
    where = work.batch.response_BT
    policy, reference = (torch.log_softmax(work.before[r].detach(), -1) for r in (Role.POLICY, Role.REFERENCE))
    kl = torch.zeros(where.shape)
    kl[:, 1:] = kl_divergence(policy, reference)[:, :-1]
    prepared = plain_preparation(OBJECTIVE, work.batch, work.before)
    assert means(prepared.metrics)["kl/policy_reference"] == pytest.approx(float(sum_tokens(kl, where).mean()))


@pytest.mark.parametrize(
    ("kl", "examples", "coefficient"),
    [
        (6.0, 1000, 0.1),
        (6.6, 1000, 0.1 * (1 + 0.1 * 0.1)),
        (60.0, 1000, 0.1 * (1 + 0.2 * 0.1)),  # errors count up to 20 %
        (0.0, 1000, 0.1 * (1 - 0.2 * 0.1)),
        (0.0, 10**9, 0.1 * (1 - 0.2)),  # it never turns round
    ],
)
def test_an_adaptive_coefficient_follows_the_measured_kl(kl, examples, coefficient):
    objective = PPO(kl_coef=0.1, kl_target=6.0, kl_horizon=10_000)
    state = objective.next_state(objective.initial_state(), {"objective/kl": kl}, examples)
    assert state == pytest.approx({"kl_coef": coefficient})


def test_a_rollout_is_judged_with_the_coefficient_of_its_time():
    work = random_work(OBJECTIVE)
    early, late = (plain_preparation(OBJECTIVE, work.batch, work.before, {"kl_coef": c}) for c in (0.1, 0.2))
    assert means(late.metrics)["objective/kl_coef"] == pytest.approx(0.2)
    assert means(late.metrics)["objective/rewards_kl"] == pytest.approx(
        2 * means(early.metrics)["objective/rewards_kl"]
    )
    assert means(late.metrics)["objective/rewards_kl"] == pytest.approx(-0.2 * means(late.metrics)["objective/kl"])


def test_a_fixed_coefficient_stays():
    assert OBJECTIVE.next_state({"kl_coef": 0.5}, {"objective/kl": 100.0}, 64) == {"kl_coef": 0.5}


def test_what_it_reads_before_and_during_its_updates():
    assert (PPO.data, PPO.on_policy, PPO.prepares) == (DataKind.RESPONSES, OnPolicy.ALWAYS, Prepares.ROLLOUT)
    whole = {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION}
    assert PPO().needs == {**whole, Role.REWARD: Need.SCORE, Role.CRITIC: Need.VALUE}
    assert PPO(normalize_reward=True).needs[Role.REWARD] is Need.NORMALIZED_SCORE
    assert PPO().update_needs == {Role.POLICY: Need.LOGP, Role.CRITIC: Need.VALUE}
    assert not PPO().is_scalar


def test_a_ratio_of_e_to_the_80_stays_finite():
    work = random_work(OBJECTIVE)
    far = {**work.logits, Role.POLICY: (work.logits[Role.POLICY].detach() * 40).float().requires_grad_()}
    found = {name: value.float() for name, value in found_in(OBJECTIVE, [work])[0].items()}
    loss = plain_loss(OBJECTIVE, work.batch, far, found)
    assert loss.per_example.isfinite().all()
    assert gradient_of(loss, far[Role.POLICY]).isfinite().all()
    assert loss_of(OBJECTIVE, work).per_example.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_horizon": 100}, "`kl_horizon` belongs to the adaptive coefficient; add `kl_target`, or remove it"),
        ({"kl_target": 6, "kl_coef": 0}, "`kl_target` scales `kl_coef`, and 0 stays 0"),
        ({"kl_target": 0}, "greater than 0"),
        ({"clip_range": 1}, "less than 1"),
        ({"gamma": 1.1}, "less than or equal to 1"),
        ({"gae_lambda": -0.1}, "greater than or equal to 0"),
        ({"reward_clip": 0}, "greater than 0"),
        ({"kl_coef": -1}, "greater than or equal to 0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PPO.model_validate(fields)


def test_the_horizon_is_there_with_a_target_alone():
    assert (PPO().kl_target, PPO().kl_horizon) == (None, None)
    assert PPO(kl_target=6).kl_horizon == 10_000
    assert PPO(kl_target=6, kl_horizon=5).kl_horizon == 5


@pytest.mark.parametrize("fields", [{}, {"kl_target": 6}, {"kl_target": 6, "kl_horizon": 5}, {"reward_clip": None}])
def test_what_is_written_down_is_read_again(fields):
    assert PPO.model_validate(PPO(**fields).model_dump()) == PPO(**fields)
