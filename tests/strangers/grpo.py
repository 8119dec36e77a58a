"""Group relative policy optimization: a response is worth how far its score is above those of the same prompt."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import last_tokens, mean_of, sum_tokens
from aligndistil.objectives.actor_critic import clipped_policy_loss
from aligndistil.objectives.base import Loss, Need, Objective, OnPolicy, Prepared, Prepares, Role
from aligndistil.objectives.types import MetricInfo, TermInfo, scalar_term


def group_advantages(score_B: Tensor, group_B: Tensor) -> Tensor:
    """(B,) (score - mean of its group) / deviation of its group; section 4.1 of https://arxiv.org/abs/2402.03300."""
    _, place_B, sizes = torch.unique(group_B, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(sizes), dtype=score_B.dtype).scatter_add(0, place_B, score_B) / sizes
    centred_B = score_B - mean[place_B]
    variance = torch.zeros_like(mean).scatter_add(0, place_B, centred_B.square()) / sizes
    return centred_B / (variance.sqrt()[place_B] + 1e-4)


class GRPO(Objective):
    """Group relative policy optimization: PPO's clipped loss, with other samples of the prompt for a critic."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    prepares = Prepares.ROLLOUT
    groups = True
    paper = "Shao et al. 2024, arXiv 2402.03300"
    metrics = {"objective/scores": MetricInfo("", "mean over responses of the score", better="more")}
    terms = {"logp": TermInfo("log p", "log-probability of the token under the policy")}
    headline = ("objective/scores",)

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(0.2, gt=0)
    """How far a token's probability ratio may move from 1 and still be rewarded for it."""

    needs = property(lambda self: {Role.POLICY: Need.LOGP, Role.REWARD: Need.SCORE})
    update_needs = property(lambda self: {Role.POLICY: Need.LOGP})

    def token_terms(self, chunk: Any) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: Any) -> Prepared:
        score_B = sum_tokens(terms[scalar_term(Role.REWARD, Need.SCORE)], last_tokens(batch.response_BT))
        advantage_BT = group_advantages(score_B, batch.group_B)[:, None] * batch.response_BT
        return Prepared({"old_logp": terms["logp"], "advantage": advantage_BT}, {"objective/scores": mean_of(score_B)})

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        given = {"logp_BT": terms["logp"], "old_logp_BT": terms["old_logp"], "advantage_BT": terms["advantage"]}
        return Loss(clipped_policy_loss(**given, response_BT=batch.response_BT, clip_range=self.clip_range), {})
