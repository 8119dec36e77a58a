"""What actor-critic objectives (PPO, RTO) share: a base class, advantages of a rollout, clipped losses, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import Metric, kl_divergence, last_tokens, mean_of, mean_tokens, sum_tokens
from aligndistil.objectives.base import Expected, Loss, Need, Objective, OnPolicy, Prepares, Role, Sampled, TokenChunk
from aligndistil.objectives.types import FIRST_STEP_NATS, MetricInfo, TermInfo

_SMALLEST_VARIANCE = 1e-8

TERMS = {
    "logp": TermInfo("log p", "log-probability of the token under the policy"),
    "kl_sampled": TermInfo("log-ratio", "log-probability under the policy less that under the reference"),
    "kl": TermInfo("KL to reference", "KL(policy || reference) over the whole vocabulary"),
}

METRICS = {
    "objective/rewards": MetricInfo(
        "",
        "mean over responses of `sum_t R_t`, the token rewards that advantages are made of; the sum of the parts below",
        title="Reward of the policy's samples",
        better="more",
    ),
    "objective/rewards_kl": MetricInfo(
        "",
        "mean over responses of the KL's part: `-kl_coef sum_t k_t` (ppo), `-beta2 sum_t k_t` (rto), `k_t` as in "
        "`objective/kl`",
    ),
    "objective/kl": MetricInfo(
        "nats",
        "mean over responses of `sum_t k_t`, `k_t = log pi(y_t|s_t) - log pi_ref(y_t|s_t)` with the policy that "
        'sampled: the KL estimated from the tokens alone ("k1"), which is what the reward is charged for',
    ),
    "objective/kl_token": MetricInfo("nats per token", "mean over responses of the same sum divided by `|y|`"),
    "kl/policy_reference": MetricInfo(
        "nats",
        "mean over responses of `sum_t KL(pi(.|s_t) || pi_ref(.|s_t))` with the policy that sampled, full vocabulary; "
        "`objective/kl` estimates it",
        title="KL to the reference",
        axis="KL (nats per response)",
    ),
    "advantages/mean": MetricInfo(
        "",
        "mean over tokens of the rollout of the advantage `A_t` before whitening: what the rewards to come exceed the "
        "critic's value by",
    ),
    "advantages/square": MetricInfo(
        "",
        "mean over tokens of its square; `sqrt(advantages/square - advantages/mean²)` is the deviation that whitening "
        "divides by",
    ),
    "returns/mean": MetricInfo(
        "", "mean over tokens of the rollout of the return `A_t + V_t`, the critic's target; not whitened"
    ),
    "returns/square": MetricInfo("", "mean over tokens of its square"),
    "loss/policy": MetricInfo(
        "",
        "mean over responses of the mean over tokens of `-min(rho A, clip(rho) A)`, `A` whitened over the whole "
        "rollout, `rho = pi / pi_old` the ratio to the policy that sampled; the same as `loss`, and near 0 by "
        "construction",
    ),
    "loss/value": MetricInfo(
        "",
        "mean over responses of the mean over tokens of `1/2 max((V - return)², (V held within value_clip_range of "
        "the rollout's - return)²)`: what the critic minimises",
        title="Loss of the critic",
        better="less",
    ),
    "policy/clip_fraction": MetricInfo(
        "share",
        "tokens of the update whose ratio is beyond the clip on the side that the advantage asks for, and which have "
        "no gradient",
    ),
    "policy/approx_kl": MetricInfo(
        "nats per token",
        'mean over tokens of the update of `rho - 1 - log rho`, which is on average `KL(pi_old || pi)` ("k3")',
    ),
    "policy/ratio_max": MetricInfo("", "largest `rho` of any token of the update (a maximum, like `.../max`)"),
    "value/explained_variance": MetricInfo(
        "up to 1",
        "share of the returns' variance over the tokens of the rollout that the values before the update explain: "
        "`1 - Var(A) / Var(return)`; 0 is no better than a constant, below 0 worse; absent where all returns are the "
        "same",
    ),
}
"""Those of `compute_advantages` and `actor_critic_update`; the parts of the reward are the objective's own."""

SCORE_METRICS = {
    "objective/scores": MetricInfo(
        "",
        "mean over responses of the reward model's score, normalised where `normalize_reward` says so, before it is "
        "cut to `reward_clip`",
        title="Score of the policy's samples",
        better="more",
    ),
    "objective/scores_clipped": MetricInfo("share", "responses whose score `reward_clip` cuts; absent without a clip"),
    "objective/rewards_score": MetricInfo(
        "",
        "mean over responses of the score's part of the reward: the score cut to `reward_clip`, times `beta3` (rto)",
    ),
}
"""Of objectives that read a reward model."""


def generalized_advantages(
    *, reward_BT: Tensor, value_BT: Tensor, response_BT: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """(B, T) sum over i >= 0 of (gamma lambda)^i delta_(t+i), zero off the response, whose text is worth 0 at its end.

    Equation 16 of Schulman et al. 2015 (https://arxiv.org/abs/1506.02438), delta_t = r_t + gamma V_(t+1) - V_t.
    """
    value_BT = value_BT * response_BT
    next_value_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], dim=1)
    delta_BT = (reward_BT + gamma * next_value_BT - value_BT) * response_BT
    return discounted_sums(delta_BT, gamma * gae_lambda) * response_BT


def discounted_sums(values_BT: Tensor, discount: float) -> Tensor:
    """(B, T) sum over i >= 0 of discount^i values_(t+i), in log2(T) operations instead of T."""
    window = 1
    while window < values_BT.shape[1]:
        # each entry has summed the next `window` values; as many more are in the entry that far away
        values_BT = values_BT + discount**window * F.pad(values_BT[:, window:], (0, window))
        window *= 2
    return values_BT


def whiten(values: Tensor, *, mean: Tensor, square: Tensor) -> Tensor:
    """Values of mean 0 and biased variance 1, from the means of all values and of their squares."""
    return (values - mean) * (square - mean.square()).clamp(min=_SMALLEST_VARIANCE).rsqrt()


def clipped_policy_loss(
    *, logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, response_BT: Tensor, clip_range: float
) -> Tensor:
    """(B,) mean over tokens of -min(rho A, clip(rho, 1 - c, 1 + c) A), rho the ratio to the policy that sampled.

    Equation 7 of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347).
    """
    ratio_BT = (logp_BT - old_logp_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    return -mean_tokens(torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT), response_BT)


def clipped_value_loss(
    *, value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, response_BT: Tensor, clip_range: float
) -> Tensor:
    """(B,) mean over tokens of half the larger squared error, of V and of V held within c of what it was.

    The squared error of equation 9 of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347); the clip is that of
    their code, not of their paper.
    """
    near_BT = old_value_BT + (value_BT - old_value_BT).clamp(-clip_range, clip_range)
    error_BT = torch.maximum((value_BT - return_BT).square(), (near_BT - return_BT).square())
    return mean_tokens(error_BT, response_BT) / 2


def kl_of_ratio(logratio: Tensor) -> Tensor:
    """rho - 1 - log rho >= 0, whose mean over samples of q is KL(q || p) for rho = p / q ("k3")."""
    return logratio.exp() - 1 - logratio


class Rollout(NamedTuple):
    """What a loss on advantages keeps of a rollout, and measures of it."""

    terms: dict[str, Tensor]
    """(B, T): `old_logp` and `old_value` of the models that sampled it, `advantage` before whitening, and `return`."""
    metrics: dict[str, Metric]


def compute_advantages(
    *,
    reward_parts: Mapping[str, Tensor],
    terms: Mapping[str, Tensor],
    response_BT: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Rollout:
    """Advantages and returns for token rewards (B, T) that are the sum of named parts.

    `terms` are `logp`, `kl_sampled` (log pi - log pi_ref of the token), the exact `kl`, and `critic_value`.
    """
    value_BT, reward_BT = terms["critic_value"], torch.stack(list(reward_parts.values())).sum(0)
    advantage_BT = generalized_advantages(
        reward_BT=reward_BT, value_BT=value_BT, response_BT=response_BT, gamma=gamma, gae_lambda=gae_lambda
    )
    return_BT = advantage_BT + value_BT * response_BT
    found = {"old_logp": terms["logp"], "old_value": value_BT, "advantage": advantage_BT, "return": return_BT}
    parts = {f"objective/rewards_{of}": mean_of(sum_tokens(part, response_BT)) for of, part in reward_parts.items()}
    metrics = {
        "objective/rewards": mean_of(sum_tokens(reward_BT, response_BT)),
        "objective/kl": mean_of(sum_tokens(terms["kl_sampled"], response_BT)),
        "objective/kl_token": mean_of(mean_tokens(terms["kl_sampled"], response_BT)),
        "kl/policy_reference": mean_of(sum_tokens(terms["kl"], response_BT)),
        "advantages/mean": mean_of(advantage_BT, response_BT),
        "advantages/square": mean_of(advantage_BT.square(), response_BT),
        "returns/mean": mean_of(return_BT, response_BT),
        "returns/square": mean_of(return_BT.square(), response_BT),
    }
    return Rollout(found, metrics | parts)


def score_metrics(*, score_BT: Tensor, clip: float | None, response_BT: Tensor) -> dict[str, Metric]:
    """A reward model's scores of whole responses, before the clip, and how many the clip cuts."""
    score_B = sum_tokens(score_BT, last_tokens(response_BT))
    metrics = {"objective/scores": mean_of(score_B)}
    if clip is not None:
        metrics["objective/scores_clipped"] = mean_of((score_B.abs() > clip).to(score_B.dtype))
    return metrics


class Update(NamedTuple):
    """(B,) losses of policy and critic, which share no graph, and what is logged of them."""

    policy_B: Tensor
    value_B: Tensor
    metrics: dict[str, Metric]
    maxima: dict[str, Tensor]


def actor_critic_update(
    *, terms: Mapping[str, Tensor], response_BT: Tensor, clip_range: float, value_clip_range: float
) -> Update:
    """Clipped losses, of the policy on whitened advantages, of the critic on returns as they are.

    `terms` are `logp`, `critic_value`, those of `compute_advantages`, and the means of its metrics over the whole step.
    """
    advantage_BT = whiten(terms["advantage"], mean=terms["advantages/mean"], square=terms["advantages/square"])
    policy_B = clipped_policy_loss(
        logp_BT=terms["logp"],
        old_logp_BT=terms["old_logp"],
        advantage_BT=advantage_BT,
        response_BT=response_BT,
        clip_range=clip_range,
    )
    value_B = clipped_value_loss(
        value_BT=terms["critic_value"],
        old_value_BT=terms["old_value"],
        return_BT=terms["return"],
        response_BT=response_BT,
        clip_range=value_clip_range,
    )
    logratio_BT = (terms["logp"] - terms["old_logp"]).detach()
    ratio_BT = logratio_BT.exp()
    held_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range) * advantage_BT < ratio_BT * advantage_BT
    metrics = {
        "loss/policy": mean_of(policy_B),
        "loss/value": mean_of(value_B),
        "policy/clip_fraction": mean_of(held_BT.to(ratio_BT.dtype), response_BT),
        "policy/approx_kl": mean_of(kl_of_ratio(logratio_BT), response_BT),
        "value/explained_variance": _explained_variance(terms, len(policy_B)),
    }
    return Update(policy_B, value_B, metrics, {"policy/ratio_max": (ratio_BT * response_BT).max()})


def _explained_variance(means: Mapping[str, Tensor], rows: int) -> Metric:
    """Of the returns, by the values at the rollout: what they leave unexplained is the advantage."""
    left, whole = (means[f"{of}/square"] - means[f"{of}/mean"].square() for of in ("advantages", "returns"))
    varies = whole > _SMALLEST_VARIANCE
    return mean_of(torch.where(varies, 1 - left / whole, 0.0).expand(rows), varies.expand(rows))


class ActorCritic(Objective):
    """Base of objectives with a critic: what is updated on a rollout, and how. Subclasses make its rewards."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    sampled = Sampled.TEMPERED
    prepares = Prepares.ROLLOUT

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward that comes a token later."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Weight of later value errors in an advantage: 0 trusts the critic, 1 the sampled rewards."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability ratio may move from 1 and still be rewarded for it."""
    value_clip_range: float = Field(0.2, gt=0)
    """How far a value may move from that of the rollout and still be rewarded for it."""

    @property
    def update_needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP, Role.CRITIC: Need.VALUE}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def preparation_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {
            "logp": chunk.logp[Role.POLICY],
            "kl_sampled": chunk.logp[Role.POLICY] - chunk.logp[Role.REFERENCE],
            "kl": kl_divergence(chunk.logps[Role.POLICY], chunk.logps[Role.REFERENCE]),
        }

    def advantages(self, batch: Batch, terms: Mapping[str, Tensor], reward_parts: Mapping[str, Tensor]) -> Rollout:
        """Of token rewards (B, T) that are the sum of named parts."""
        mask, gamma, gae_lambda = batch.response_BT, self.gamma, self.gae_lambda
        return compute_advantages(
            reward_parts=reward_parts, terms=terms, response_BT=mask, gamma=gamma, gae_lambda=gae_lambda
        )

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        update = actor_critic_update(
            terms=terms,
            response_BT=batch.response_BT,
            clip_range=self.clip_range,
            value_clip_range=self.value_clip_range,
        )
        return Loss(update.policy_B, update.metrics, update.maxima, update.value_B)

    def first_step(self) -> list[Expected]:
        same = "policy and reference are the same model at step 0"
        return [Expected("kl/policy_reference", 0.0, FIRST_STEP_NATS, same)]
