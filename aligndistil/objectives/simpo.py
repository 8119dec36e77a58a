"""Simple preference optimization: the mean log-probability of a response is its reward, and no reference is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import mean_of, mean_tokens
from aligndistil.objectives.base import ImplicitReward, Loss, MetricInfo, Need, Objective, Role, TokenChunk
from aligndistil.objectives.metrics import LOGP, LOGP_METRICS, PREFERENCE_METRICS, preference_metrics


def simpo_loss(*, mean_logp_chosen: Tensor, mean_logp_rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """(E,) losses from log pi(y|x) / |y| of both responses, EOS included.

    Equation 6 of Meng et al. 2024 (https://arxiv.org/abs/2405.14734); gamma is the margin in units of the reward.
    """
    return -F.logsigmoid(beta * (mean_logp_chosen - mean_logp_rejected) - gamma)


class SimPO(Objective):
    """Simple preference optimization: a logistic loss on length-normalised log-probabilities, with a target margin."""

    data = DataKind.PAIRS
    implicit_reward = ImplicitReward.MEAN_LOGP
    paper = "Meng et al. 2024, arXiv 2405.14734"
    title = "SimPO"
    terms = {"logp": LOGP}
    metrics = {
        **PREFERENCE_METRICS,
        **LOGP_METRICS,
        "rewards/margins_above_gamma": MetricInfo(
            "nats",
            "mean over pairs of chosen minus rejected reward minus the target margin gamma: what the loss is a "
            "function of",
        ),
    }
    headline = ("rewards/margins", "rewards/accuracies", "loss")

    name: Literal["simpo"] = "simpo"
    beta: float = Field(10.0, gt=0)
    """Scale of the reward beta log pi(y|x) / |y|. Published: 2 to 10; 10 is that of arXiv 2503.02832, app. C."""
    gamma_beta_ratio: float | None = Field(0.5, ge=0)
    """Target margin in nats per token: gamma = gamma_beta_ratio x beta. Published: 0.25 to 0.8."""
    simpo_gamma: float | None = Field(None, ge=0)
    """The same margin as TRL's CPO trainer takes it, gamma itself; instead of `gamma_beta_ratio`."""

    @model_validator(mode="before")
    @classmethod
    def _one_margin(cls, given: Any) -> Any:
        """A gamma takes the place of the default ratio, so that what is written down afterwards names just one."""
        if not isinstance(given, dict):
            return given
        both = {key: given.get(key) for key in ("gamma_beta_ratio", "simpo_gamma")}
        if None not in both.values():
            raise ValueError(
                "`gamma_beta_ratio` and `simpo_gamma` both set the margin, gamma = gamma_beta_ratio x beta; "
                "keep one of them and remove the other"
            )
        if both["simpo_gamma"] is not None:
            return {**given, "gamma_beta_ratio": None}
        return {key: value for key, value in given.items() if value is not None or key not in both}

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    @property
    def gamma(self) -> float:
        """The target margin in units of the reward."""
        if self.simpo_gamma is not None:
            return self.simpo_gamma
        assert self.gamma_beta_ratio is not None
        return self.gamma_beta_ratio * self.beta

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        mean_logp_B = mean_tokens(terms["logp"], batch.response_BT)
        losses = simpo_loss(
            mean_logp_chosen=mean_logp_B[0::2], mean_logp_rejected=mean_logp_B[1::2], beta=self.beta, gamma=self.gamma
        )
        reward_B = self.beta * mean_logp_B
        metrics = preference_metrics(reward_B=reward_B, logp_BT=terms["logp"], response_BT=batch.response_BT)
        above_gamma = reward_B[0::2] - reward_B[1::2] - self.gamma
        return Loss(losses, {**metrics, "rewards/margins_above_gamma": mean_of(above_gamma)})
