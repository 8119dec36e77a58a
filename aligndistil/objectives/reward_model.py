"""A reward model: a scalar head that scores the chosen response of a pair above the rejected one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import last_tokens, mean_of, sum_tokens
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, Role, TokenChunk, scalar_term
from aligndistil.objectives.metrics import PREFERENCE_METRICS, ranked_right


def reward_model_loss(*, score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """(E,) losses from the scores of both responses.

    The Bradley-Terry likelihood, equation 1 of Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155) for pairs.
    """
    return -F.logsigmoid(score_chosen - score_rejected)


class RewardModel(Objective):
    """A reward model on pairs: the score of a response is that of the text up to its last token."""

    data = DataKind.PAIRS
    paper = "Ouyang et al. 2022, arXiv 2203.02155"
    title = "reward model"
    metrics = {
        **PREFERENCE_METRICS,
        "scores/mean": MetricInfo("", "mean over all responses, chosen and rejected, of the score"),
        "scores/square": MetricInfo(
            "",
            "mean over all responses of the square of the score; `sqrt(scores/square - scores/mean²)` is the deviation "
            "that `normalize_reward` divides by",
        ),
    }
    headline = ("rewards/margins", "rewards/accuracies", "loss")

    name: Literal["reward_model"] = "reward_model"

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.SCORE}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        score_B = sum_tokens(terms[scalar_term(Role.POLICY, Need.SCORE)], last_tokens(batch.response_BT))
        losses = reward_model_loss(score_chosen=score_B[0::2], score_rejected=score_B[1::2])
        margin = (score_B[0::2] - score_B[1::2]).detach()
        metrics = {
            "rewards/chosen": mean_of(score_B[0::2]),
            "rewards/rejected": mean_of(score_B[1::2]),
            "rewards/margins": mean_of(margin),
            "rewards/accuracies": mean_of(ranked_right(margin)),
            "scores/mean": mean_of(score_B),
            "scores/square": mean_of(score_B.square()),
        }
        return Loss(losses, metrics)
