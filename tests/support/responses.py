"""Responses one by one, for formulas that are written out again in a test, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.objectives.base import Objective, Role
from support.plain_formula import Logits, gradient_of, plain_loss


class Response(NamedTuple):
    """What one model says of one response of n tokens."""

    logps: Tensor
    """(n, V)"""
    ids: Tensor
    """(n,)"""
    after: Tensor
    """(n, V) one position late: a frequent mistake."""

    @property
    def logp(self) -> Tensor:
        """(n,)"""
        return self.logps[torch.arange(len(self.ids)), self.ids]


def responses(batch: Batch, logits_BTV: Tensor) -> list[Response]:
    """One for each row; the logits at a token's predecessor speak about it."""
    found = []
    for row, mask in enumerate(batch.response_BT):
        at = mask.nonzero().squeeze(-1)
        logps = torch.log_softmax(logits_BTV[row], -1)
        found.append(Response(logps[at - 1], batch.ids_BT[row, at], logps[at]))
    return found


Formula = Callable[[dict[str, list[Response]]], list[Tensor]]
"""One loss an example, from what each role says of each row."""


def distances(objective: Objective, formula: Formula, batch: Batch, logits: Logits) -> tuple[float, float]:
    """How far a formula is from an objective, relatively: in the mean loss, and in its gradient."""
    leaf = logits[Role.POLICY]
    ours = plain_loss(objective, batch, logits)
    other = torch.stack(formula({role: responses(batch, z) for role, z in logits.items()})).mean()
    mine, theirs = gradient_of(ours, leaf), torch.autograd.grad(other, leaf)[0]
    mean = ours.per_example.mean().detach()
    return float((other.detach() - mean).abs() / mean.abs()), float((theirs - mine).norm() / mine.norm())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """(n,) from log-probabilities (n, V)."""
    return (p.exp() * (p - q)).sum(-1)
