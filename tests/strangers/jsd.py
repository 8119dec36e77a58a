"""On-policy distillation with the generalised Jensen-Shannon divergence, from a role of its own."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import kl_divergence, mean_of, mean_tokens, sum_tokens
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, OnPolicy, Role, TermInfo, TokenChunk


def jsd(*, logps: Tensor, expert_logps: Tensor, beta: float) -> Tensor:
    """(n,) beta KL(expert || m) + (1 - beta) KL(policy || m), m = beta expert + (1 - beta) policy.

    Equation 1 of Agarwal et al. 2024 (https://arxiv.org/abs/2306.13649).
    """
    mixture = torch.logaddexp(expert_logps + math.log(beta), logps + math.log1p(-beta))
    return beta * kl_divergence(expert_logps, mixture) + (1 - beta) * kl_divergence(logps, mixture)


class JSD(Objective):
    """On-policy distillation: the divergence from an expert's distribution at each token that the policy sampled."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    roles = {"expert": "The model whose distribution is learnt."}
    terms = {"jsd": TermInfo("JSD", "Jensen-Shannon divergence of policy and expert")}
    metrics = {"jsd/sequence": MetricInfo("nats", "mean over responses of the sum of the divergences", better="less")}
    headline = ("jsd/sequence", "loss")

    name: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the expert in the mixture."""

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.DISTRIBUTION, "expert": Need.DISTRIBUTION}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"jsd": jsd(logps=chunk.logps[Role.POLICY], expert_logps=chunk.logps["expert"], beta=self.beta)}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        metrics = {"jsd/sequence": mean_of(sum_tokens(terms["jsd"], batch.response_BT))}
        return Loss(mean_tokens(terms["jsd"], batch.response_BT), metrics)
