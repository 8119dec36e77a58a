"""Pure tensor functions that two or more objectives use. No configuration, no state, no device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def kl_divergence(logps: Tensor, target_logps: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, from log-probabilities of p and of q; gradient through both."""
    return (logps.exp() * (logps - target_logps)).sum(-1)


def total_variation(logps: Tensor, other_logps: Tensor) -> Tensor:
    """Total variation distance over the last dimension, with the factor 1/2: in [0, 1]."""
    return (logps.exp() - other_logps.exp()).abs().sum(-1) / 2
