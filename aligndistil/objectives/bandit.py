"""The response as one action: a policy gradient on the summed contrastive reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import kl_divergence, mean_of, sum_tokens
from aligndistil.objectives import metrics as shared
from aligndistil.objectives.base import Loss, Need, Objective, OnPolicy, Role, TokenChunk
from aligndistil.objectives.metrics import SAMPLED_REWARD_NEEDS, sampled_reward_terms, teacher_metrics


def bandit_loss(
    *, logp_B: Tensor, logratio_B: Tensor, reward_B: Tensor, length_B: Tensor, beta: float, literal: bool
) -> Tensor:
    """(B,) minus Eq. 42 of https://arxiv.org/abs/2503.02832; `logratio_B` is log pi(y|x) - log pi_teacher(y|x).

    In the score-function form reward and log-ratio are one reward without gradient, so that its expectation is the
    gradient of reward minus beta KL. As printed, the log-ratio has a gradient, which is that of log pi(y|x) again:
    its whole effect is to subtract the constant beta from the reward.
    """
    reward_B = reward_B.detach()
    if literal:
        return -(reward_B * logp_B - beta * logratio_B) / length_B
    return -(reward_B - beta * logratio_B).detach() * logp_B / length_B


class Bandit(Objective):
    """Policy gradient on the contrastive DPO reward of the whole response, KL to the DPO model included (Eq. 42)."""

    data = DataKind.RESPONSES
    teacher_beta = "beta0"
    on_policy = OnPolicy.ALWAYS
    paper = "Zhang et al. 2025, arXiv 2503.02832, app. E"
    title = "bandit"
    terms = shared.SAMPLED_REWARD_TERMS
    metrics = shared.TEACHER_METRICS | shared.SAMPLED_RETURN_METRICS
    headline = ("reward/token_mean", "kl/policy_teacher", "loss")

    name: Literal["bandit"] = "bandit"
    beta: float = Field(0.08, gt=0)
    """Static coefficient of KL(policy || teacher)."""
    beta0: float = Field(0.1, gt=0)
    """The beta that the DPO models were trained with; the reward is beta0 (log pi_teacher - log pi_reverse_teacher)."""
    literal: bool = False
    """Eq. 42 as printed, whose KL term does not hold the policy near the teacher; false is what its footnote 2 says."""

    @property
    def needs(self) -> dict[str, Need]:
        """The loss reads log-probabilities alone; the distributions are for the exact KL that is logged."""
        return SAMPLED_REWARD_NEEDS

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        kl = kl_divergence(chunk.logps[Role.POLICY].detach(), chunk.logps[Role.TEACHER])
        return {**sampled_reward_terms(chunk, self.beta0), "kl_teacher": kl}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        mask, reward_BT = batch.response_BT, terms["reward"]
        reward_B = sum_tokens(reward_BT, mask)
        logratio_B = sum_tokens(terms["logp"] - terms["teacher_logp"].detach(), mask)
        losses = bandit_loss(
            logp_B=sum_tokens(terms["logp"], mask),
            logratio_B=logratio_B,
            reward_B=reward_B,
            length_B=batch.length_B,
            beta=self.beta,
            literal=self.literal,
        )
        metrics = teacher_metrics(reward_BT=reward_BT, kl_teacher_BT=terms["kl_teacher"], response_BT=mask) | {
            "reward/sequence_square": mean_of(reward_B.square()),
            "kl/policy_teacher_sampled": mean_of(logratio_B),
        }
        return Loss(losses, metrics)
