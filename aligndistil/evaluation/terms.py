"""Two models side by side, token by token, through the same chunked projection as the objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.maths import kl_divergence, sum_tokens
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk


class Divergence(Objective):
    """KL(policy || other) of each token, over the whole vocabulary."""

    data = DataKind.RESPONSES
    paper = "Zhang et al. 2025, arXiv 2503.02832, Table 3"
    name: Literal["divergence"] = "divergence"

    @property
    def needs(self) -> dict[Role, Need]:
        return {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"value": kl_divergence(chunk.logps[Role.POLICY], chunk.logps[Role.REFERENCE])}


class LogRatio(Objective):
    """log policy(token) - log other(token)."""

    data = DataKind.RESPONSES
    paper = "Rafailov et al. 2023, arXiv 2305.18290, Eq. 5"
    name: Literal["log_ratio"] = "log_ratio"

    @property
    def needs(self) -> dict[Role, Need]:
        return {Role.POLICY: Need.LOGP, Role.REFERENCE: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"value": chunk.logp[Role.POLICY] - chunk.logp[Role.REFERENCE]}


@torch.no_grad()
def sequence_sums(
    measure: Objective, policy: Policy, other: FrozenModel, batches: Sequence[Batch], device: torch.device
) -> list[float]:
    """The sum over response tokens of `measure`, for each row of each batch."""
    sums: list[float] = []
    for batch in batches:
        batch = batch.to(device)
        terms = policy(batch, measure, {Role.REFERENCE: other.read(batch)})
        sums += sum_tokens(terms["value"], batch.response_BT).tolist()
    return sums
