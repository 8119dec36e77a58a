"""What is measured of a policy and never trained on: its KL to other models, and the log-probabilities of tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from aligndistil.batch import DataKind
from aligndistil.maths import kl_divergence
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk


class Divergence(Objective):
    """KL(policy || other) of each token, over the whole vocabulary, for each of `others`; terms are named by role."""

    data = DataKind.RESPONSES
    paper = "Zhang et al. 2025, arXiv 2503.02832, Table 3"
    name: Literal["divergence"] = "divergence"
    others: tuple[str, ...] = (Role.REFERENCE,)

    @property
    def needs(self) -> dict[str, Need]:
        return dict.fromkeys((Role.POLICY, *self.others), Need.DISTRIBUTION)

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        policy = chunk.logps[Role.POLICY]
        return {role: kl_divergence(policy, chunk.logps[role]) for role in self.others}


class LogProbability(Objective):
    """The log-probability of each response token, the term `logp`."""

    data = DataKind.RESPONSES
    name: Literal["logp"] = "logp"

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}
