"""Supervised fine-tuning: the mean negative log-likelihood of each response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import mean_of, mean_tokens
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, Role, TokenChunk
from aligndistil.objectives.metrics import LOGP


def sft_loss(*, logp_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) minus the mean log-probability of the response tokens of each row, EOS included."""
    return -mean_tokens(logp_BT, response_BT)


class SFT(Objective):
    """Supervised fine-tuning on one response per prompt."""

    data = DataKind.RESPONSES
    paper = "Ouyang et al. 2022, arXiv 2203.02155"
    title = "SFT"
    terms = {"logp": LOGP}
    metrics = {
        "logps/token_mean": MetricInfo(
            "nats per token", "mean over responses of `1/|y| sum_t log pi(y_t|s_t)`; here minus the loss"
        )
    }

    name: Literal["sft"] = "sft"

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        losses = sft_loss(logp_BT=terms["logp"], response_BT=batch.response_BT)
        return Loss(losses, {"logps/token_mean": mean_of(-losses)})
