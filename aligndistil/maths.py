"""Pure tensor functions that two or more objectives use. No configuration, no state, no device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
