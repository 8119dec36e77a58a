import math

import pytest
import torch
from pydantic import ValidationError

from aligndistil.batch import DataKind, Row, collate
from aligndistil.objectives.base import Need, OnPolicy, Prepares, Role
from aligndistil.objectives.ppo import PPO
from aligndistil.objectives.rto import RTO
from support.micro_batches import random_work
from support.plain_formula import means, plain_preparation

V2, V3 = RTO(gae_lambda=1.0), RTO(version="v3", beta3=0.5, reward_clip=None, gae_lambda=1.0)
WORK = random_work(V3, examples=4)
BATCH = collate([Row([5], [6, 7, 1]), Row([5], [1])], DataKind.RESPONSES, pad_id=0)
NOTHING = torch.zeros(2, 4, dtype=torch.float64)
ROLLOUT = {
    "logp": NOTHING,
    "kl_sampled": NOTHING.new_tensor([[0, 2, 0, -2], [0, 4, 0, 0]]),
    "kl": NOTHING,
    "teacher_logratio": NOTHING.new_tensor([[0, 10, -20, 30], [0, 1, 0, 0]]),
    "critic_value": NOTHING,
}
SCORE = {"reward_score": NOTHING.new_tensor([[0, 50, 60, 25], [0, 3, 0, 0]])}


def rewards(prepared):
    """(B, T): without a critic, a return less the one after it."""
    returns = prepared.terms["return"]
    return returns - torch.cat([returns[:, 1:], torch.zeros(len(returns), 1)], dim=1)


def test_the_rewards_of_version_2_worked_out_by_hand():
    # 0.1 log-ratio - 0.05 k: 1 - 0.1, -2, 3 + 0.1, and 0.1 - 0.2
    prepared = V2.prepare(BATCH, ROLLOUT, {})
    expected = torch.tensor([[-3.0, 0.9, -2.0, 3.1], [0.1, -0.1, 0.0, 0.0]])
    torch.testing.assert_close(rewards(prepared)[BATCH.response_BT], expected[BATCH.response_BT])
    parts = {"objective/rewards": 1.9 / 2, "objective/rewards_teacher": 2.1 / 2, "objective/rewards_kl": -0.2 / 2}
    assert means(prepared.metrics) == pytest.approx({**means(prepared.metrics), **parts})
    assert not any("score" in name for name in means(prepared.metrics))


def test_discount_and_lambda_are_those_of_the_objective():
    # rewards 0.9, -2 and 3.1, as above, and no values: each and 1/4 of what follows
    prepared = RTO(gamma=0.5, gae_lambda=0.5).prepare(BATCH, ROLLOUT, {})
    expected = torch.tensor([[0.0, 0.59375, -1.225, 3.1], [0.0, -0.1, 0.0, 0.0]])
    torch.testing.assert_close(prepared.terms["advantage"], expected)


def test_policy_and_critic_are_clipped_by_their_own_ranges():
    # ratios 1.5 (held at 1.1), 1, 0.5 (held at 0.9) and 1, of whitened advantages 1, 1, -1 and -1
    # values that moved from 7, 8, 9 to 7.1 (error 2.9), 8.5 (error 2.5: it may move by 1), 9 (error 2); and error 2
    terms = {
        "logp": NOTHING.new_tensor([[0, math.log(1.5), 0, math.log(0.5)], [0, 0, 0, 0]]),
        "old_logp": NOTHING,
        "advantage": NOTHING.new_tensor([[0, 1, 1, -1], [0, -1, 0, 0]]),
        "critic_value": NOTHING.new_tensor([[0, 7.1, 8.5, 9], [0, -1, 0, 0]]),
        "old_value": NOTHING.new_tensor([[0, 7, 8, 9], [0, -1, 0, 0]]),
        "return": NOTHING.new_tensor([[0, 10, 11, 11], [0, 1, 0, 0]]),
    }
    over_step = {"advantages/mean": 0, "advantages/square": 1, "returns/mean": 8.25, "returns/square": 343 / 4}
    over_step = {name: NOTHING.new_tensor(value) for name, value in over_step.items()}
    loss = RTO(clip_range=0.1, value_clip_range=1.0).loss(BATCH, {**terms, **over_step})
    assert loss.per_example.tolist() == pytest.approx([-(1.1 + 1 - 0.9) / 3, 1.0])
    assert loss.critic_per_example.tolist() == pytest.approx([(2.9**2 + 2.5**2 + 4) / 6, 2.0])


def test_clips_cut_the_reward_of_a_token_after_its_weight_and_the_score_before_its_own():
    # 0.1 x 10, -20, 30 are cut to +-0.5; the score 25 to 10, of which 2 x 10 is taken, and 2 x 3
    objective = RTO(version="v3", beta2=0, beta3=2, token_reward_clip=0.5, reward_clip=10, gae_lambda=1.0)
    prepared = objective.prepare(BATCH, {**ROLLOUT, **SCORE}, {})
    expected = torch.tensor([[0.0, 0.5, -0.5, 20.5], [0.0, 6.1, 0.0, 0.0]])
    torch.testing.assert_close(rewards(prepared)[BATCH.response_BT], expected[BATCH.response_BT])
    parts = {
        "objective/scores": 14,
        "objective/scores_clipped": 0.5,
        "objective/rewards_score": 13,
        "objective/rewards_teacher": 0.3,
    }
    assert means(prepared.metrics) == pytest.approx({**means(prepared.metrics), **parts})


def test_the_rewards_of_a_response_are_its_two_weighted_log_ratios():
    """No reward model is asked for in version 2; where there is none, none can be read."""
    assert Role.REWARD not in V2.needs
    before = {role: z for role, z in WORK.before.items() if role != Role.REWARD}
    prepared = plain_preparation(V2, WORK.batch, {**before, Role.CRITIC: torch.zeros_like(before[Role.CRITIC])})
    for row, where in enumerate(WORK.batch.response_BT):
        at = where.nonzero().flatten()
        policy, teacher, reference = (
            torch.log_softmax(before[role][row].detach(), -1)[at - 1, WORK.batch.ids_BT[row, at]].sum()
            for role in (Role.POLICY, Role.TEACHER, Role.REFERENCE)
        )
        expected = 0.1 * (teacher - reference) - 0.05 * (policy - reference)
        torch.testing.assert_close(prepared.terms["return"][row, at[0]], expected)


def test_version_3_adds_the_score_at_the_last_token_alone():
    before = {**WORK.before, Role.CRITIC: torch.zeros_like(WORK.before[Role.CRITIC])}
    second, third = (rewards(plain_preparation(objective, WORK.batch, before)) for objective in (V2, V3))
    for row, where in enumerate(WORK.batch.response_BT):
        at = where.nonzero().flatten()
        added = (third - second)[row, at]
        torch.testing.assert_close(added[:-1], torch.zeros(len(at) - 1))
        torch.testing.assert_close(added[-1], 0.5 * before[Role.REWARD][row, at[-1]])


def test_with_a_teacher_that_is_the_reference_version_3_is_ppo():
    before = {**WORK.before, Role.TEACHER: WORK.before[Role.REFERENCE]}
    third = RTO(version="v3", beta2=0.3, beta3=1, reward_clip=1)
    of_rto, of_ppo = (
        plain_preparation(objective, WORK.batch, before) for objective in (third, PPO(kl_coef=0.3, reward_clip=1))
    )
    torch.testing.assert_close(of_rto.terms, of_ppo.terms)
    shared = means(of_ppo.metrics).keys() - {"objective/kl_coef"}
    assert {n: v for n, v in means(of_rto.metrics).items() if n in shared} == pytest.approx(
        {n: v for n, v in means(of_ppo.metrics).items() if n in shared}
    )


def test_what_it_reads_before_and_during_its_updates():
    assert (RTO.data, RTO.on_policy, RTO.prepares) == (DataKind.RESPONSES, OnPolicy.ALWAYS, Prepares.ROLLOUT)
    whole = {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION, Role.TEACHER: Need.LOGP}
    assert V2.needs == {**whole, Role.CRITIC: Need.VALUE}
    assert V3.needs == {**whole, Role.REWARD: Need.SCORE, Role.CRITIC: Need.VALUE}
    assert V2.update_needs == V3.update_needs == {Role.POLICY: Need.LOGP, Role.CRITIC: Need.VALUE}


def test_defaults_of_both_versions():
    assert (V2.beta1, V2.beta2, V2.beta3, V2.reward_clip, V2.token_reward_clip) == (0.1, 0.05, None, None, None)
    third = RTO(version="v3")
    assert (third.beta1, third.beta2, third.beta3, third.reward_clip) == (0.1, 0.05, 1.0, 10.0)


@pytest.mark.parametrize("fields", [{"beta3": 1.0}, {"reward_clip": 10.0}, {"version": "v2", "beta3": 0.5}])
def test_a_score_is_refused_in_version_2(fields):
    unused = next(name for name in fields if name != "version")
    with pytest.raises(ValidationError, match=f"v2 does not use `{unused}`; remove it, or write version: v3"):
        RTO.model_validate(fields)


@pytest.mark.parametrize("objective", [V2, V3, RTO(version="v3"), RTO(token_reward_clip=0.05)])
def test_what_is_written_down_is_read_again(objective):
    assert RTO.model_validate(objective.model_dump()) == objective


@pytest.mark.parametrize(
    "fields", [{"version": "v4"}, {"beta1": 0}, {"beta2": -1}, {"version": "v3", "beta3": 0}, {"token_reward_clip": 0}]
)
def test_other_values_are_refused(fields):
    with pytest.raises(ValidationError):
        RTO.model_validate(fields)
