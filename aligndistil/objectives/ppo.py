"""Proximal policy optimization against a reward model, with a KL to the reference in the reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.maths import clipped, last_tokens, mean_of
from aligndistil.objectives import actor_critic
from aligndistil.objectives.actor_critic import ActorCritic, score_metrics
from aligndistil.objectives.base import Need, Prepared, Role, State
from aligndistil.objectives.types import MetricInfo, scalar_term

_SCORE = scalar_term(Role.REWARD, Need.SCORE)


def ppo_reward_parts(
    *, kl_sampled_BT: Tensor, score_BT: Tensor, response_BT: Tensor, kl_coef: float, reward_clip: float | None
) -> dict[str, Tensor]:
    """(B, T) each: -kl_coef (log pi - log pi_ref), and the clipped score of the response, at its last token alone.

    Section 2.2 of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), the penalty laid on the tokens it comes from.
    """
    score_BT = clipped(score_BT, reward_clip) * last_tokens(response_BT)
    return {"kl": -kl_coef * kl_sampled_BT * response_BT, "score": score_BT}


class PPO(ActorCritic):
    """Proximal policy optimization of a reward model's score minus a KL to the reference, with a critic."""

    paper = "Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593"
    title = "PPO"
    reads_last_score = True
    terms = actor_critic.TERMS
    metrics = {
        **actor_critic.SCORE_METRICS,
        **actor_critic.METRICS,
        "objective/kl_coef": MetricInfo("", "`kl_coef` of this rollout; it moves only with `kl_target`"),
    }
    headline = ("objective/scores", "kl/policy_reference", "loss/value")

    name: Literal["ppo"] = "ppo"
    kl_coef: float = Field(0.01, ge=0)
    """Coefficient of the KL to the reference in the reward; with `kl_target` that of the first rollout."""
    kl_target: float | None = Field(None, gt=0)
    """Nats of sampled KL a response that `kl_coef` is adapted to after each rollout; null holds it fixed."""
    kl_horizon: int | None = Field(10_000, gt=0)
    """Samples over which an error of 20 % or more moves `kl_coef` by 20 %; only with `kl_target`."""
    reward_clip: float | None = Field(10.0, gt=0)
    """Scores are cut to plus and minus this; null leaves them."""
    normalize_reward: bool = False
    """Scores less their mean, over their standard deviation, both from the reward model's evaluation data."""

    @model_validator(mode="before")
    @classmethod
    def _horizon_belongs_to_target(cls, given: Any) -> Any:
        """A fixed coefficient is written down without the default horizon that it does not use."""
        if not isinstance(given, dict):
            return given
        if given.get("kl_target") is None:
            if given.get("kl_horizon") is not None:
                raise ValueError("`kl_horizon` belongs to the adaptive coefficient; add `kl_target`, or remove it")
            return {**given, "kl_horizon": None}
        if given.get("kl_coef") == 0:
            raise ValueError("`kl_target` scales `kl_coef`, and 0 stays 0; write for example kl_coef: 0.01")
        return {key: value for key, value in given.items() if value is not None or key != "kl_horizon"}

    @property
    def needs(self) -> dict[str, Need]:
        """The reward reads log-probabilities alone; the distributions are for the exact KL that is logged."""
        score = Need.NORMALIZED_SCORE if self.normalize_reward else Need.SCORE
        whole: dict[str, Need] = {Role.POLICY: Need.DISTRIBUTION, Role.REFERENCE: Need.DISTRIBUTION}
        return {**whole, Role.REWARD: score, Role.CRITIC: Need.VALUE}

    def initial_state(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: State) -> Prepared:
        mask, clip, score_BT = batch.response_BT, self.reward_clip, terms[_SCORE]
        parts = ppo_reward_parts(
            kl_sampled_BT=terms["kl_sampled"],
            score_BT=score_BT,
            response_BT=mask,
            kl_coef=state["kl_coef"],
            reward_clip=clip,
        )
        rollout = self.advantages(batch, terms, parts)
        metrics = rollout.metrics | score_metrics(score_BT=score_BT, clip=clip, response_BT=mask)
        coef_B = torch.full((batch.rows,), state["kl_coef"], device=mask.device)
        return Prepared(rollout.terms, {**metrics, "objective/kl_coef": mean_of(coef_B)})

    def next_state(self, state: State, means: Mapping[str, float], examples: int) -> dict[str, float]:
        """Section 2.2 of Ziegler et al. 2019; a rollout longer than the horizon counts as one horizon."""
        if self.kl_target is None or self.kl_horizon is None:
            return dict(state)
        error = min(max(means["objective/kl"] / self.kl_target - 1, -0.2), 0.2)
        return {"kl_coef": state["kl_coef"] * (1 + error * min(examples / self.kl_horizon, 1.0))}
