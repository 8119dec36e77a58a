"""Pure tensor functions that two or more objectives use. No configuration, no state, no device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SMALLEST_VARIANCE = 1e-8


class Metric(NamedTuple):
    """A sum and a count: the mean is taken once, over ranks and micro-batches. A metric with count 0 is left out."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]


def mean_of(values: Tensor, where: Tensor | None = None) -> Metric:
    """The metric that averages `values`, or those of them where `where` holds. Detached."""
    values = values.detach()
    if where is None:
        return Metric(values.sum(), torch.tensor(float(values.numel()), device=values.device))
    return Metric((values * where).sum(), where.sum().to(values.dtype))


def sum_tokens(terms_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) the sum over the response tokens of each row."""
    return (terms_BT * response_BT).sum(-1)


def mean_tokens(terms_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) the mean over the response tokens of each row, each row by its own length ("seq-mean")."""
    return sum_tokens(terms_BT, response_BT) / response_BT.sum(-1).clamp(min=1)


def preference_metrics(*, reward_B: Tensor, logp_BT: Tensor, response_BT: Tensor) -> dict[str, Metric]:
    """What every loss on pairs logs: rewards and log-probabilities of both sides. Rows are interleaved."""
    margin = (reward_B[0::2] - reward_B[1::2]).detach()
    logp_B, per_token_B = sum_tokens(logp_BT, response_BT), mean_tokens(logp_BT, response_BT)
    return {
        "rewards/chosen": mean_of(reward_B[0::2]),
        "rewards/rejected": mean_of(reward_B[1::2]),
        "rewards/margins": mean_of(margin),
        "rewards/accuracies": mean_of((margin > 0).to(margin.dtype)),
        "logps/chosen": mean_of(logp_B[0::2]),
        "logps/rejected": mean_of(logp_B[1::2]),
        "logps/chosen_token_mean": mean_of(per_token_B[0::2]),
        "logps/rejected_token_mean": mean_of(per_token_B[1::2]),
    }


def teacher_metrics(*, reward_BT: Tensor, kl_teacher_BT: Tensor, response_BT: Tensor) -> dict[str, Metric]:
    """What every loss on a teacher's token reward logs, so that their curves can be laid over each other."""
    return {
        "reward/token_mean": mean_of(mean_tokens(reward_BT, response_BT)),
        "reward/sequence": mean_of(sum_tokens(reward_BT, response_BT)),
        "kl/policy_teacher": mean_of(sum_tokens(kl_teacher_BT, response_BT)),
        "kl/policy_teacher_token": mean_of(mean_tokens(kl_teacher_BT, response_BT)),
    }


def last_tokens(response_BT: Tensor) -> Tensor:
    """(B, T) bool: the last response token of each row, by its position and never by its id."""
    left_BT = response_BT.flip(-1).cumsum(-1).flip(-1)
    return response_BT & (left_BT == 1)


def clipped(values: Tensor, limit: float | None) -> Tensor:
    """Cut to plus and minus `limit`; None leaves them."""
    return values if limit is None else values.clamp(-limit, limit)


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
    reach = 1
    while reach < values_BT.shape[1]:
        # each entry has summed the next `reach` values; as many more are in the entry that far away
        values_BT = values_BT + discount**reach * F.pad(values_BT[:, reach:], (0, reach))
        reach *= 2
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


def judge_rollout(
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

    `terms` are `logp`, `critic_value`, those of `judge_rollout`, and the means of its metrics over the whole step.
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
    """Of the returns, by the values that the rollout was judged with: what they leave unexplained is the advantage."""
    left, whole = (means[f"{of}/square"] - means[f"{of}/mean"].square() for of in ("advantages", "returns"))
    varies = whole > _SMALLEST_VARIANCE
    return mean_of(torch.where(varies, 1 - left / whole, 0.0).expand(rows), varies.expand(rows))


def kl_divergence(logps: Tensor, target_logps: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, from log-probabilities of p and of q; gradient through both."""
    divergence: Tensor = _KLDivergence.apply(logps, target_logps)  # type: ignore[no-untyped-call]
    return divergence


class _KLDivergence(torch.autograd.Function):
    """Written out so that nothing of the vocabulary's size is kept for the backward pass but the two inputs."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, target_logps: Tensor) -> Tensor:
        ctx.save_for_backward(logps, target_logps)
        divergence: Tensor = (logps - target_logps).mul_(logps.exp()).sum(-1)
        return divergence

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logps, target_logps = ctx.saved_tensors
        weighted = logps.exp().mul_(grad.unsqueeze(-1))
        to_target = -weighted if ctx.needs_input_grad[1] else None
        to_logps = (logps - target_logps).add_(1).mul_(weighted) if ctx.needs_input_grad[0] else None
        return to_logps, to_target


@torch.no_grad()
def total_variation(logps: Tensor, other_logps: Tensor) -> Tensor:
    """Total variation distance over the last dimension, with the factor 1/2: in [0, 1]. Carries no gradient."""
    distance: Tensor = torch.linalg.vector_norm(logps.exp().sub_(other_logps.exp()), ord=1, dim=-1) / 2
    return distance
