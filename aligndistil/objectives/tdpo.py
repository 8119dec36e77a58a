"""Token-level direct preference optimization: DPO with the forward KL of both responses in the margin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import kl_divergence, mean_of, sum_tokens
from aligndistil.objectives.base import Expected, Loss, Need, Objective, Role, TokenChunk
from aligndistil.objectives.metrics import LOGP, LOGP_METRICS, PREFERENCE_METRICS, REF_LOGP, preference_metrics
from aligndistil.objectives.types import FIRST_STEP_NATS, ImplicitReward, MetricInfo, TermInfo


def tdpo_loss(
    *,
    logratio_chosen: Tensor,
    logratio_rejected: Tensor,
    kl_chosen: Tensor,
    kl_rejected: Tensor,
    beta: float,
    alpha: float | None,
) -> Tensor:
    """(E,) losses from sequence log-ratios log pi - log pi_ref and summed forward divergences KL(pi_ref || pi).

    Zeng et al. 2024 (https://arxiv.org/abs/2404.11999): without `alpha` TDPO1, through whose two divergences the
    gradient flows; with it TDPO2, which scales their difference and holds the chosen one fixed.
    """
    kl_margin = kl_chosen - kl_rejected if alpha is None else alpha * (kl_chosen.detach() - kl_rejected)
    return -F.logsigmoid(beta * (logratio_chosen - logratio_rejected + kl_margin))


class TDPO(Objective):
    """Token-level direct preference optimization: DPO with the forward KL of both responses in its margin."""

    data = DataKind.PAIRS
    implicit_reward = ImplicitReward.LOG_RATIO
    paper = "Zeng et al. 2024, arXiv 2404.11999"
    terms = {
        "logp": LOGP,
        "ref_logp": REF_LOGP,
        "kl": TermInfo("KL to reference", "KL(reference || policy) over the whole vocabulary"),
    }
    metrics = {
        **PREFERENCE_METRICS,
        **LOGP_METRICS,
        "rewards/chosen_with_kl": MetricInfo(
            "nats",
            "mean over chosen responses of `beta (log pi(y|x) - log pi_ref(y|x) + K)`, `K` as in `kl/chosen`; neither "
            "`alpha` nor `version` is in it",
        ),
        "rewards/rejected_with_kl": MetricInfo("nats", "the same over rejected responses"),
        "kl/chosen": MetricInfo(
            "nats",
            "mean over chosen responses of `K = sum_t KL(pi_ref(.|s_t) || pi(.|s_t))`, the reference first, full "
            "vocabulary",
        ),
        "kl/rejected": MetricInfo("nats", "the same over rejected responses"),
        "kl/margin": MetricInfo("nats", "mean over pairs of chosen minus rejected `K`"),
    }
    headline = ("rewards/margins", "rewards/accuracies", "loss")

    name: Literal["tdpo"] = "tdpo"
    version: Literal[1, 2] = 2
    """1: both divergences enter as they are; 2: weighted by `alpha`, the chosen one without gradient."""
    beta: float = Field(0.1, gt=0)
    """Strength of the constraint to the reference, for log-ratios and divergences alike."""
    alpha: float | None = Field(0.1, ge=0)
    """Weight of the divergences in version 2: 0 is DPO; 0.1 is that of arXiv 2503.02832, app. C, 0.5 TDPO's own."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_belongs_to_version_2(cls, given: Any) -> Any:
        """Version 1 is written down without the default `alpha` that it does not use."""
        if not isinstance(given, dict):
            return given
        if given.get("version") == 1:
            if given.get("alpha") is not None:
                raise ValueError("`alpha` belongs to version: 2; remove it, or write version: 2")
            return {**given, "alpha": None}
        return {key: value for key, value in given.items() if value is not None or key != "alpha"}

    @property
    def method(self) -> str:
        return f"TDPO{self.version}"

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {
            "logp": chunk.logp[Role.POLICY],
            "ref_logp": chunk.logp[Role.REFERENCE],
            "kl": kl_divergence(chunk.logps[Role.REFERENCE], chunk.logps[Role.POLICY]),
        }

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        mask = batch.response_BT
        logratio_B = sum_tokens(terms["logp"] - terms["ref_logp"], mask)
        kl_B = sum_tokens(terms["kl"], mask)
        losses = tdpo_loss(
            logratio_chosen=logratio_B[0::2],
            logratio_rejected=logratio_B[1::2],
            kl_chosen=kl_B[0::2],
            kl_rejected=kl_B[1::2],
            beta=self.beta,
            alpha=self.alpha,
        )
        with_kl_B = self.beta * (logratio_B + kl_B)
        metrics = preference_metrics(reward_B=self.beta * logratio_B, logp_BT=terms["logp"], response_BT=mask) | {
            "rewards/chosen_with_kl": mean_of(with_kl_B[0::2]),
            "rewards/rejected_with_kl": mean_of(with_kl_B[1::2]),
            "kl/chosen": mean_of(kl_B[0::2]),
            "kl/rejected": mean_of(kl_B[1::2]),
            "kl/margin": mean_of(kl_B[0::2] - kl_B[1::2]),
        }
        return Loss(losses, metrics)

    def first_step(self) -> list[Expected]:
        same, tolerance = "policy and reference are the same model at step 0", self.beta * FIRST_STEP_NATS
        return [
            Expected("loss", math.log(2), tolerance, same),
            *(Expected(f"rewards/{which}", 0.0, tolerance, same) for which in ("chosen", "rejected")),
            *(Expected(f"kl/{which}", 0.0, FIRST_STEP_NATS, same) for which in ("chosen", "rejected")),
        ]
