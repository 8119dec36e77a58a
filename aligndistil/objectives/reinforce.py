"""REINFORCE on the contrastive token reward: AlignDistil's exact expectation replaced by sampled returns-to-go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import kl_divergence, mean_of, mean_tokens, sum_tokens
from aligndistil.objectives import metrics as shared
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, OnPolicy, Role, TokenChunk
from aligndistil.objectives.metrics import SAMPLED_REWARD_NEEDS, sampled_reward_terms, teacher_metrics


def returns_to_go(*, reward_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B, T) G_t = sum over i >= t of r_i in the response: undiscounted, r_t included, not divided by the length."""
    return (reward_BT * response_BT).flip(-1).cumsum(-1).flip(-1)


def reinforce_loss(*, logp_BT: Tensor, return_BT: Tensor, kl_BT: Tensor, response_BT: Tensor, beta: float) -> Tensor:
    """(B,) minus Eq. 43 of https://arxiv.org/abs/2503.02832, by each response's own length.

    `return_BT` carries no gradient; `kl_BT` is KL(policy || teacher) over the vocabulary, with its exact gradient.
    """
    return -mean_tokens(return_BT.detach() * logp_BT - beta * kl_BT, response_BT)


class Reinforce(Objective):
    """Policy gradient on the contrastive DPO reward of each token, with an exact KL to the DPO model (Eq. 43)."""

    data = DataKind.RESPONSES
    teacher_beta = "beta0"
    on_policy = OnPolicy.ALWAYS
    paper = "Zhang et al. 2025, arXiv 2503.02832, app. E"
    title = "REINFORCE"
    terms = shared.SAMPLED_REWARD_TERMS
    metrics = {
        **shared.TEACHER_METRICS,
        **shared.SAMPLED_RETURN_METRICS,
        "returns/token_mean": MetricInfo(
            "nats",
            "mean over responses of `1/|y| sum_t G_t`, `G_t = sum_{i >= t} r(y_i)` the undiscounted return-to-go that "
            "weighs token t",
            title="Return-to-go of the policy's samples",
            axis="token-averaged return (nats)",
            on_samples=True,
        ),
    }
    headline = ("reward/token_mean", "kl/policy_teacher", "loss")

    name: Literal["reinforce"] = "reinforce"
    beta: float = Field(0.08, gt=0)
    """Static coefficient of KL(policy || teacher)."""
    beta0: float = Field(0.1, gt=0)
    """The beta that the DPO models were trained with; the reward is beta0 (log pi_teacher - log pi_reverse_teacher)."""

    @property
    def needs(self) -> dict[str, Need]:
        return SAMPLED_REWARD_NEEDS

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        """The KL has its exact gradient."""
        kl = kl_divergence(chunk.logps[Role.POLICY], chunk.logps[Role.TEACHER])
        return {**sampled_reward_terms(chunk, self.beta0), "kl_teacher": kl}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        mask, reward_BT, kl_BT = batch.response_BT, terms["reward"], terms["kl_teacher"]
        return_BT = returns_to_go(reward_BT=reward_BT, response_BT=mask)
        losses = reinforce_loss(
            logp_BT=terms["logp"], return_BT=return_BT, kl_BT=kl_BT, response_BT=mask, beta=self.beta
        )
        metrics = teacher_metrics(reward_BT=reward_BT, kl_teacher_BT=kl_BT, response_BT=mask) | {
            "reward/sequence_square": mean_of(sum_tokens(reward_BT, mask).square()),
            "returns/token_mean": mean_of(mean_tokens(return_BT, mask)),
            "kl/policy_teacher_sampled": mean_of(sum_tokens(terms["logp"] - terms["teacher_logp"], mask)),
        }
        return Loss(losses, metrics)
