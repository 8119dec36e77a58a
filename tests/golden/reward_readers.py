"""Readers of the golden files of methods with a reward model or a critic, which begin at numbers about tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case import Content, TermsCase, after_prompt, floats, interleaved
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import mean_of
from aligndistil.objectives.actor_critic import (
    clipped_value_loss,
    generalized_advantages,
    kl_of_ratio,
    whiten,
)
from aligndistil.objectives.ppo import PPO, ppo_reward_parts
from aligndistil.objectives.reward_model import RewardModel
from aligndistil.objectives.rto import RTO, rto_reward_parts


def _batch(kind: DataKind, where: Tensor) -> Batch:
    response = after_prompt(where).bool()
    attention = response | (torch.arange(response.shape[1]) == 0)
    return Batch(kind, response.long(), attention, response, torch.ones(len(response), dtype=torch.bool))


def read_reward_model(content: Content) -> Iterator[TermsCase]:
    inputs, expected = content["inputs"], content["expected"]
    order = interleaved(len(inputs["chosen_reward"]), 0, 1)
    score = floats([*inputs["chosen_reward"], *inputs["rejected_reward"]])
    gradient = floats([*expected["grad_chosen"], *expected["grad_rejected"]])
    pairs = len(score) // 2
    yield TermsCase(
        "pairs",
        RewardModel(),
        _batch(DataKind.PAIRS, torch.ones(len(score), 1)),
        {"policy_score": after_prompt(score[order, None])},
        loss=expected["loss"],
        gradients={"policy_score": after_prompt(gradient[order, None])},
        metrics={
            "rewards/accuracies": expected["accuracy"],
            "rewards/chosen": float(score[:pairs].mean()),
            "rewards/rejected": float(score[pairs:].mean()),
            "rewards/margins": float((score[:pairs] - score[pairs:]).mean()),
            "scores/mean": float(score.mean()),
            "scores/square": float(score.square().mean()),
        },
    )


def _judged(numbers: Content) -> dict[str, Tensor]:
    advantage, returns = (after_prompt(floats(numbers[key])) for key in ("advantages", "returns"))
    return {"advantage": advantage, "return": returns}


def _whitened(numbers: Content, key: str, batch: Batch) -> tuple[Tensor, Tensor]:
    advantage = after_prompt(floats(numbers["advantages"]))
    mean, square = (total / n for total, n in (mean_of(a, batch.response_BT) for a in (advantage, advantage.square())))
    return whiten(advantage, mean=mean, square=square) * batch.response_BT, after_prompt(floats(numbers[key]))


def read_ppo(content: Content) -> Iterator[TermsCase]:
    inputs, expected = content["inputs"], content["expected"]
    where = floats(inputs["action_mask"])
    batch = _batch(DataKind.RESPONSES, where)
    old, base, value, new, new_value = (
        after_prompt(floats(inputs[key])) for key in ("old_logp", "base_logp", "values", "new_logp", "new_values")
    )
    score = floats(inputs["rm_score"])[:, None].expand_as(old)
    low, high = inputs["reward_clip"]
    assert low == -high
    objective = PPO(
        kl_coef=inputs["kl_coef"],
        gamma=inputs["gamma"],
        gae_lambda=inputs["lambd"],
        clip_range=inputs["clip"],
        value_clip_range=inputs["value_clip"],
        reward_clip=high,
    )
    k1 = old - base
    parts = ppo_reward_parts(
        kl_sampled_BT=k1, score_BT=score, response_BT=batch.response_BT, kl_coef=inputs["kl_coef"], reward_clip=high
    )
    reward, k3 = (after_prompt(floats(expected[key])) for key in ("token_reward", "kl_k3"))
    of_rewards = {
        f"reinforce_returns_gamma{name}": generalized_advantages(
            reward_BT=reward,
            value_BT=torch.zeros_like(reward),
            response_BT=batch.response_BT,
            gamma=gamma,
            gae_lambda=1,
        )
        for name, gamma in (("1", 1.0), ("0_9", 0.9))
    }
    without_clip = clipped_value_loss(
        value_BT=new_value,
        old_value_BT=value,
        return_BT=after_prompt(floats(expected["returns"])),
        response_BT=batch.response_BT,
        clip_range=1e9,
    )
    tokens = where.sum(-1)
    k1_of_file = floats(expected["kl_k1"])
    yield TermsCase(
        "rollout-and-update",
        objective,
        batch,
        {"logp": new, "critic_value": new_value},
        # the exact KL is of distributions, which the file does not have
        rollout={"logp": old, "kl_sampled": k1, "kl": k1, "reward_score": score, "critic_value": value},
        prepared={"old_logp": old, "old_value": value, **_judged(expected)},
        loss=expected["policy_loss"],
        critic_loss=expected["value_loss"],
        gradients={
            "logp": after_prompt(floats(expected["grad_new_logp"])),
            "critic_value": after_prompt(floats(expected["grad_new_values"])),
        },
        metrics={
            "objective/scores": float(floats(inputs["rm_score"]).mean()),
            "objective/scores_clipped": float((floats(inputs["rm_score"]).abs() > high).double().mean()),
            "objective/rewards": float(floats(expected["token_reward"]).sum(-1).mean()),
            "objective/kl": float(k1_of_file.sum(-1).mean()),
            "objective/kl_token": float((k1_of_file.sum(-1) / tokens).mean()),
            "objective/kl_coef": inputs["kl_coef"],
            "loss/policy": expected["policy_loss"],
            "loss/value": expected["value_loss"],
        },
        tolerance=1e-6,
        pieces={
            "token_reward": (parts["kl"] + parts["score"], reward),
            "whitened_advantages": _whitened(expected, "whitened_advantages", batch),
            "value_loss_noclip": (without_clip.mean(), floats(expected["value_loss_noclip"])),
            "kl_k3": (kl_of_ratio(-k1) * batch.response_BT, k3),
            **{name: (ours, after_prompt(floats(expected[name]))) for name, ours in of_rewards.items()},
        },
    )


def read_rto(content: Content) -> Iterator[TermsCase]:
    inputs = content["inputs"]
    batch = _batch(DataKind.RESPONSES, floats(inputs["action_mask"]))
    logp, ref_logp, teacher_logp, value = (
        after_prompt(floats(inputs[key])) for key in ("policy_logp", "ref_logp", "dpo_logp", "values")
    )
    score = floats(inputs["rm_score"])[:, None].expand_as(logp)
    for key, expected in content["expected"].items():
        weights = {"beta1": expected["beta1"], "beta2": expected["beta2_kl"]}
        # 0 is how the file says that there is no clip; the score's is that of the authors' code
        extra = {"beta3": expected["beta3"], "reward_clip": 10.0} if "beta3" in expected else {}
        token_clip = expected.get("clip") or None
        objective = RTO(
            version="v3" if extra else "v2",
            gamma=inputs["gamma"],
            gae_lambda=inputs["lambd"],
            token_reward_clip=token_clip,
            **weights,
            **extra,
        )
        terms = {"kl_sampled": logp - ref_logp, "teacher_logratio": teacher_logp - ref_logp}
        parts = rto_reward_parts(
            **{f"{name}_BT": values for name, values in terms.items()},
            score_BT=score if extra else None,
            response_BT=batch.response_BT,
            token_reward_clip=token_clip,
            **weights,
            **{"beta3": None, "reward_clip": None, **extra},
        )
        rollout = {"logp": logp, "kl": terms["kl_sampled"], "critic_value": value, **terms}
        reward = floats(expected["token_reward"])
        yield TermsCase(
            key,
            objective,
            batch,
            {"logp": logp, "critic_value": value},
            rollout={**rollout, "reward_score": score} if extra else rollout,
            prepared={"old_logp": logp, "old_value": value, **_judged(expected)},
            metrics={"objective/rewards": float(reward.sum(-1).mean()), "policy/ratio_max": 1.0},
            pieces={
                "token_reward": (sum(parts.values()), after_prompt(reward)),
                "whitened": _whitened(expected, "whitened", batch),
            },
        )
