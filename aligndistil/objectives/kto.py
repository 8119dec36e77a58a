"""Kahneman-Tversky optimization: single responses, each labelled desirable or undesirable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import mean_of, sum_tokens
from aligndistil.objectives.base import Expected, Loss, Need, Objective, Prepared, Prepares, Role, State, TokenChunk
from aligndistil.objectives.metrics import LOGP, REF_LOGP
from aligndistil.objectives.types import FIRST_STEP_NATS, ImplicitReward, MetricInfo


def kto_loss(
    *,
    logratio_B: Tensor,
    desirable_B: Tensor,
    z0: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """(B,) losses from the sequence log-ratios log pi(y|x) - log pi_ref(y|x) and the reference point z0, a constant.

    Equation 8 of Ethayarajh et al. 2024 (https://arxiv.org/abs/2402.01306): lambda - v, which is the weight times
    1 - sigmoid(beta (r - z0)) for a desirable response, and the same with r and z0 exchanged for an undesirable one.
    """
    gain_B = beta * (logratio_B - z0.detach())
    return torch.where(
        desirable_B, desirable_weight * torch.sigmoid(-gain_B), undesirable_weight * torch.sigmoid(gain_B)
    )


class KTO(Objective):
    """Kahneman-Tversky optimization: a saturating value of each response, gain or loss against the mean KL."""

    data = DataKind.UNPAIRED
    prepares = Prepares.MISMATCHED
    implicit_reward = ImplicitReward.LOG_RATIO
    paper = "Ethayarajh et al. 2024, arXiv 2402.01306"
    title = "KTO"
    terms = {"logp": LOGP, "ref_logp": REF_LOGP}
    metrics = {
        "rewards/desirable": MetricInfo(
            "nats",
            "mean over desirable responses of `r = beta (log pi(y|x) - log pi_ref(y|x))`, log-probabilities summed "
            "over tokens; absent where a step has none",
        ),
        "rewards/undesirable": MetricInfo("nats", "the same over undesirable responses"),
        "logps/desirable": MetricInfo(
            "nats",
            "mean over desirable responses of `log pi(y|x)`, summed over tokens; absent where a step has none",
        ),
        "logps/undesirable": MetricInfo("nats", "the same over undesirable responses"),
        "labels/desirable": MetricInfo(
            "share",
            "responses of the step that are desirable; times `train.batch_size` it is their number, and what is left "
            "the number of undesirable ones",
        ),
        "kl/mismatched": MetricInfo(
            "nats",
            "mean over the whole step of `log pi(y'|x) - log pi_ref(y'|x)`, `y'` the response of the next example that "
            "has another prompt; may be negative",
        ),
        "kl/z0": MetricInfo("nats", "the reference point of the step: `kl/mismatched`, or 0 where that is negative"),
    }
    headline = ("rewards/desirable", "rewards/undesirable", "loss")

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How fast the value saturates in the log-ratio to the reference; multiplies the reference point too."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of the loss of desirable responses."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of the loss of undesirable ones; where one label is rarer, its weight makes up for it."""

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP, Role.REFERENCE: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY], "ref_logp": chunk.logp[Role.REFERENCE]}

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: State) -> Prepared:
        """The mean log-ratio of responses to other prompts; it is clamped when it is that of the whole step."""
        logratio_B = sum_tokens(terms["logp"] - terms["ref_logp"], batch.response_BT)
        return Prepared({}, {"kl/mismatched": mean_of(logratio_B)})

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        desirable_B, z0 = batch.label_B, terms["kl/mismatched"].clamp(min=0)
        logratio_B = sum_tokens(terms["logp"] - terms["ref_logp"], batch.response_BT)
        losses = kto_loss(
            logratio_B=logratio_B,
            desirable_B=desirable_B,
            z0=z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        reward_B, logp_B = self.beta * logratio_B, sum_tokens(terms["logp"], batch.response_BT)
        metrics = {
            "rewards/desirable": mean_of(reward_B, desirable_B),
            "rewards/undesirable": mean_of(reward_B, ~desirable_B),
            "logps/desirable": mean_of(logp_B, desirable_B),
            "logps/undesirable": mean_of(logp_B, ~desirable_B),
            "labels/desirable": mean_of(desirable_B.to(reward_B.dtype)),
            "kl/z0": mean_of(z0.expand(batch.rows)),
        }
        return Loss(losses, metrics)

    def first_step(self) -> list[Expected]:
        same = "policy and reference are the same model at step 0"
        expected = [Expected("kl/mismatched", 0.0, FIRST_STEP_NATS, same)]
        if self.desirable_weight == self.undesirable_weight:
            tolerance = self.desirable_weight * self.beta * FIRST_STEP_NATS
            expected.append(Expected("loss", self.desirable_weight / 2, tolerance, same))
        return expected
