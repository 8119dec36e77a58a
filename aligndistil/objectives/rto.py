"""Reinforced token optimization: PPO whose reward comes with every token, from a DPO model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import clipped, kl_divergence, last_tokens
from aligndistil.objectives import actor_critic
from aligndistil.objectives.actor_critic import actor_critic_update, compute_advantages, score_metrics
from aligndistil.objectives.base import (
    Expected,
    Loss,
    MetricInfo,
    Need,
    Objective,
    OnPolicy,
    Prepared,
    Prepares,
    Role,
    State,
    TermInfo,
    TokenChunk,
    scalar_term,
)

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


class RTO(Objective):
    """Reinforced token optimization: PPO on the token reward of a DPO model, minus a KL to the reference."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    prepares = Prepares.ROLLOUT
    paper = "Zhong et al. 2024, arXiv 2404.18922"
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
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward that comes a token later."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Weight of later value errors in an advantage: 0 trusts the critic, 1 the sampled rewards."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability ratio may move from 1 and still be rewarded for it."""
    value_clip_range: float = Field(0.2, gt=0)
    """How far a value may move from that of the rollout and still be rewarded for it."""

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

    @property
    def update_needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP, Role.CRITIC: Need.VALUE}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def preparation_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        logp, ref_logp, teacher_logp = (chunk.logp[role] for role in (Role.POLICY, Role.REFERENCE, Role.TEACHER))
        kl = kl_divergence(chunk.logps[Role.POLICY], chunk.logps[Role.REFERENCE])
        return {"logp": logp, "kl_sampled": logp - ref_logp, "kl": kl, "teacher_logratio": teacher_logp - ref_logp}

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
        rollout = compute_advantages(
            reward_parts=parts, terms=terms, response_BT=mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        if score_BT is None:
            return Prepared(rollout.terms, rollout.metrics)
        scores = score_metrics(score_BT=score_BT, clip=self.reward_clip, response_BT=mask)
        return Prepared(rollout.terms, rollout.metrics | scores)

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        update = actor_critic_update(
            terms=terms,
            response_BT=batch.response_BT,
            clip_range=self.clip_range,
            value_clip_range=self.value_clip_range,
        )
        return Loss(update.policy_B, update.metrics, update.maxima, update.value_B)

    def first_step(self) -> list[Expected]:
        return [Expected("kl/policy_reference", 0.0, 0.02, "policy and reference are the same model at step 0")]
