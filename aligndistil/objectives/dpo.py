"""Direct preference optimization; with `data.reverse_preferences` it trains the reverse model of AlignDistil."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import sum_tokens
from aligndistil.objectives.base import (
    FIRST_STEP_NATS,
    Expected,
    ImplicitReward,
    Loss,
    Need,
    Objective,
    Role,
    TokenChunk,
)
from aligndistil.objectives.metrics import LOGP, LOGP_METRICS, PREFERENCE_METRICS, REF_LOGP, preference_metrics


def dpo_loss(*, logratio_chosen: Tensor, logratio_rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(E,) losses from the sequence log-ratios log pi(y|x) - log pi_ref(y|x) of both responses.

    Equation 7 of Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290); with label smoothing e the preference is
    taken to be wrong with probability e (conservative DPO).
    """
    margin = beta * (logratio_chosen - logratio_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class DPO(Objective):
    """Direct preference optimization: a logistic loss on the difference of two log-ratios to the reference."""

    data = DataKind.PAIRS
    implicit_reward = ImplicitReward.LOG_RATIO
    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    title = "DPO"
    terms = {"logp": LOGP, "ref_logp": REF_LOGP}
    metrics = PREFERENCE_METRICS | LOGP_METRICS
    headline = ("rewards/margins", "rewards/accuracies", "loss")

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference; the implicit reward is beta times the log-ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO); 0 is DPO."""

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP, Role.REFERENCE: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY], "ref_logp": chunk.logp[Role.REFERENCE]}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        logratio_B = sum_tokens(terms["logp"] - terms["ref_logp"], batch.response_BT)
        losses = dpo_loss(
            logratio_chosen=logratio_B[0::2],
            logratio_rejected=logratio_B[1::2],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        metrics = preference_metrics(
            reward_B=self.beta * logratio_B, logp_BT=terms["logp"], response_BT=batch.response_BT
        )
        return Loss(losses, metrics)

    def first_step(self) -> list[Expected]:
        same, tolerance = "policy and reference are the same model at step 0", self.beta * FIRST_STEP_NATS
        return [
            Expected("loss", math.log(2), tolerance, same),
            Expected("rewards/chosen", 0.0, tolerance, same),
            Expected("rewards/rejected", 0.0, tolerance, same),
        ]
