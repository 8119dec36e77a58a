"""Reinforced token optimization: PPO whose reward comes with every token, from a DPO model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.maths import clipped, last_tokens
from aligndistil.objectives import actor_critic
from aligndistil.objectives.actor_critic import ActorCritic, score_metrics
from aligndistil.objectives.base import Need, Prepared, Role, State, TokenChunk
from aligndistil.objectives.types import MetricInfo, TermInfo, scalar_term

_SCORE = scalar_term(Role.REWARD, Need.SCORE)
_ONLY_V3 = ("beta3", "reward_clip")


def rto_reward_parts(
    *,
    teacher_logratio_BT: Tensor,
    kl_sampled_BT: Tensor,
    score_BT: Tensor | None,
    response_BT: Tensor,
    beta1: float,
    beta2: float,
    beta3: float | None,
    token_reward_clip: float | None,
    reward_clip: float | None,
) -> dict[str, Tensor]:
    """(B, T) each: beta1 log(pi_dpo / pi_ref), -beta2 log(pi / pi_ref), and beta3 the score, at the last token alone.

    Algorithm 2 of Zhong et al. 2024 (https://arxiv.org/abs/2404.18922); its second version has no score.
    """
    teacher_BT = clipped(beta1 * teacher_logratio_BT * response_BT, token_reward_clip)
    parts = {"teacher": teacher_BT, "kl": -beta2 * kl_sampled_BT * response_BT}
    if score_BT is not None and beta3 is not None:
        parts["score"] = beta3 * clipped(score_BT, reward_clip) * last_tokens(response_BT)
    return parts


class RTO(ActorCritic):
    """Reinforced token optimization: PPO on the token reward of a DPO model, minus a KL to the reference."""

    teacher_beta = "beta1"
    paper = "Zhong et al. 2024, arXiv 2404.18922"
    title = "RTO"
    terms = {
        **actor_critic.TERMS,
        "teacher_logratio": TermInfo(
            "DPO log-ratio", "log-probability under the teacher less that under the reference"
        ),
    }
    metrics = {
        "objective/rewards_teacher": MetricInfo(
            "",
            "mean over responses of the DPO model's part: `sum_t beta1 (log pi_teacher(y_t|s_t) - log "
            "pi_ref(y_t|s_t))`, each token cut to `token_reward_clip` where there is one",
            better="more",
        ),
        **actor_critic.SCORE_METRICS,
        **actor_critic.METRICS,
    }
    headline = ("objective/rewards_teacher", "kl/policy_reference", "loss/value")

    name: Literal["rto"] = "rto"
    version: Literal["v2", "v3"] = "v2"
    """v2: token rewards alone, as in arXiv 2503.02832; v3 adds a reward model's score of the whole response."""
    beta1: float = Field(0.1, gt=0)
    """Weight of log pi_teacher - log pi_reference at each token; the beta that the DPO model was trained with."""
    beta2: float = Field(0.05, ge=0)
    """Weight of log pi - log pi_reference at each token, which is taken off."""
    beta3: float | None = Field(1.0, gt=0)
    """Weight of the reward model's score at the last token; v3 only."""
    token_reward_clip: float | None = Field(None, gt=0)
    """The DPO reward of a token is cut to plus and minus this; null leaves it. The authors' v3 has 0.05."""
    reward_clip: float | None = Field(10.0, gt=0)
    """Scores are cut to plus and minus this; null leaves them. v3 only."""

    @model_validator(mode="before")
    @classmethod
    def _score_belongs_to_v3(cls, given: Any) -> Any:
        """v2 is written down without the defaults of a score that it does not use."""
        if not isinstance(given, dict):
            return given
        if given.get("version") == "v3":
            return {key: value for key, value in given.items() if value is not None or key != "beta3"}
        if unused := [f"`{key}`" for key in _ONLY_V3 if given.get(key) is not None]:
            raise ValueError(f"version: v2 does not use {', '.join(unused)}; remove it, or write version: v3")
        return {**given, **dict.fromkeys(_ONLY_V3)}

    @property
    def needs(self) -> dict[str, Need]:
        """The reward reads log-probabilities alone; the distributions are for the exact KL that is logged."""
        whole: dict[str, Need] = {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION}
        score: dict[str, Need] = {Role.REWARD: Need.SCORE} if self.version == "v3" else {}
        return {**whole, Role.TEACHER: Need.LOGP, **score, Role.CRITIC: Need.VALUE}

    def preparation_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        own_logp = chunk.own_logp or chunk.logp  # a reward is what it is, whatever is sampled with
        teacher_logratio = own_logp[Role.TEACHER] - own_logp[Role.REFERENCE]
        return {**super().preparation_terms(chunk), "teacher_logratio": teacher_logratio}

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: State) -> Prepared:
        mask, score_BT = batch.response_BT, terms.get(_SCORE)
        parts = rto_reward_parts(
            teacher_logratio_BT=terms["teacher_logratio"],
            kl_sampled_BT=terms["kl_sampled"],
            score_BT=score_BT,
            response_BT=mask,
            beta1=self.beta1,
            beta2=self.beta2,
            beta3=self.beta3,
            token_reward_clip=self.token_reward_clip,
            reward_clip=self.reward_clip,
        )
        rollout = self.advantages(batch, terms, parts)
        if score_BT is None:
            return Prepared(rollout.terms, rollout.metrics)
        scores = score_metrics(score_BT=score_BT, clip=self.reward_clip, response_BT=mask)
        return Prepared(rollout.terms, rollout.metrics | scores)
