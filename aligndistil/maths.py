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


def count_of(total: float, count: float) -> Metric:
    """The metric of two numbers that are known to the processor."""
    return Metric(torch.tensor(float(total)), torch.tensor(float(count)))


def mean_of(values: Tensor, mask: Tensor | None = None) -> Metric:
    """The metric that averages `values`, or those of them where `mask` holds. Detached."""
    values = values.detach()
    if mask is None:
        return Metric(values.sum(), torch.tensor(float(values.numel()), device=values.device))
    return Metric((values * mask).sum(), mask.sum().to(values.dtype))


def sum_tokens(terms_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) the sum over the response tokens of each row."""
    return (terms_BT * response_BT).sum(-1)


def mean_tokens(terms_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) the mean over the response tokens of each row, each row by its own length ("seq-mean")."""
    return sum_tokens(terms_BT, response_BT) / response_BT.sum(-1).clamp(min=1)


def last_tokens(response_BT: Tensor) -> Tensor:
    """(B, T) bool: the last response token of each row, by its position and never by its id."""
    left_BT = response_BT.flip(-1).cumsum(-1).flip(-1)
    return response_BT & (left_BT == 1)


def clipped(values: Tensor, limit: float | None) -> Tensor:
    """Cut to plus and minus `limit`; None leaves them."""
    return values if limit is None else values.clamp(-limit, limit)


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
    # vector_norm adds up one number after the other, and loses 6e-5 of the sum over a vocabulary in float32.
    return logps.exp().sub_(other_logps.exp()).abs_().sum(-1) / 2
