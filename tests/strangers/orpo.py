"""Odds ratio preference optimization: SFT on the chosen response, and a logistic loss on the ratio of two odds."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import mean_of, mean_tokens
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, Role, TermInfo, TokenChunk


def orpo_loss(*, mean_logp_chosen: Tensor, mean_logp_rejected: Tensor, strength: float) -> Tensor:
    """(E,) losses; equation 6 of Hong et al. 2024 (https://arxiv.org/abs/2403.07691), from log p(y|x) / |y|."""
    log_odds = log_odds_of(mean_logp_chosen) - log_odds_of(mean_logp_rejected)
    return -mean_logp_chosen - strength * F.logsigmoid(log_odds)


def log_odds_of(mean_logp: Tensor) -> Tensor:
    """log p / (1 - p)."""
    return mean_logp - torch.log1p(-mean_logp.exp().clamp(max=1 - 1e-6))


class ORPO(Objective):
    """Odds ratio preference optimization: preferences without a reference model."""

    data = DataKind.PAIRS
    paper = "Hong et al. 2024, arXiv 2403.07691"
    terms = {"logp": TermInfo("log p", "log-probability of the token under the policy")}
    metrics = {"odds/log_ratio": MetricInfo("nats", "mean over pairs of the log of the ratio of odds", better="more")}
    headline = ("odds/log_ratio", "loss")

    name: Literal["orpo"] = "orpo"
    strength: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the likelihood of the chosen response."""

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        logp_B = mean_tokens(terms["logp"], batch.response_BT)
        chosen, rejected = logp_B[0::2], logp_B[1::2]
        losses = orpo_loss(mean_logp_chosen=chosen, mean_logp_rejected=rejected, strength=self.strength)
        return Loss(losses, {"odds/log_ratio": mean_of(log_odds_of(chosen) - log_odds_of(rejected))})
