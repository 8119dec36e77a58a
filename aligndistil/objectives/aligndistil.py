"""AlignDistil: distil the policy, token by token, towards logits extrapolated from a DPO model.

Sampled responses (a `rollout` section) make it on-policy; given responses (the chosen ones of pairs) off-policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import kl_divergence, mean_of, mean_tokens, sum_tokens, total_variation
from aligndistil.objectives.base import Loss, MetricInfo, Need, Objective, OnPolicy, Role, Sampled, TermInfo, TokenChunk
from aligndistil.objectives.metrics import KL_TEACHER, TEACHER_METRICS, TOKEN_REWARD, teacher_metrics

_SMALL_ALPHA = 0.01


def adaptive_alpha(*, tvd: Tensor, r: float, eps: float) -> Tensor:
    """(n,) extrapolation weight alpha_t = r TVD_t + eps (Eq. 16), from the distance of the two frozen models."""
    return r * tvd + eps


def extrapolated_logps(*, teacher_logps: Tensor, other_logps: Tensor, alpha: Tensor, contrastive: bool) -> Tensor:
    """(n, V) log of the target distribution, from the two frozen models' log-probabilities.

    Contrastive: z_dpo + alpha (z_dpo - z_reverse), Eqs. 15 and 17; vanilla: alpha z_dpo + (1 - alpha) z_ref, Eq. 11
    of https://arxiv.org/abs/2503.02832. Log-probabilities may stand for logits: softmax ignores the constant.
    """
    step = (teacher_logps - other_logps).mul_(alpha.unsqueeze(-1))
    return torch.log_softmax(step.add_(teacher_logps if contrastive else other_logps), dim=-1)


def aligndistil_loss(*, weighted_kl_BT: Tensor, response_BT: Tensor) -> Tensor:
    """(B,) mean over response tokens of beta_t KL(policy || target) (Eqs. 18 and 19, beta_t inside the sum)."""
    return mean_tokens(weighted_kl_BT, response_BT)


class AlignDistil(Objective):
    """Token-level distillation from an adaptive extrapolation of DPO and reverse-DPO logits."""

    data = DataKind.RESPONSES
    teacher_beta = "beta0"
    on_policy = OnPolicy.OPTIONAL
    sampled = Sampled.STATES
    paper = "Zhang et al. 2025, arXiv 2503.02832"
    title = "AlignDistil"
    terms = {
        "reward": TOKEN_REWARD,
        "tvd": TermInfo("TVD", "total variation distance between the two frozen models, 0 to 1"),
        "alpha": TermInfo("α_t", "how far beyond the teacher the target goes"),
        "beta": TermInfo("β_t", "weight of the token's divergence in the loss"),
        "kl_target": TermInfo("KL to target", "KL(policy || target) over the whole vocabulary"),
        "weighted_kl": TermInfo("β_t KL", "the token's loss, before the mean over the response"),
        "kl_teacher": KL_TEACHER,
        "expected_reward": TermInfo(
            "expected reward", "mean reward over the tokens that the policy could have sampled here"
        ),
    }
    metrics = {
        **TEACHER_METRICS,
        "reward/expected": MetricInfo(
            "nats",
            "mean over responses of `sum_t sum_v pi(v|s_t) r(v)`: the reward expected of the policy after each prefix",
            title="Expected reward",
            axis="reward (nats per response)",
            better="more",
        ),
        "kl/policy_target": MetricInfo(
            "nats",
            "mean over responses of `sum_t KL(pi(.|s_t) || pi*(.|s_t))`, `pi*` the extrapolated target, without the "
            "weight `beta_t` that the loss gives it",
            title="KL to the extrapolated target",
            axis="KL (nats per response)",
        ),
        "tvd/mean": MetricInfo(
            "0 to 1", "mean over responses of the mean over tokens of `1/2 sum_v |pi_teacher - pi_other|`"
        ),
        "tvd/max": MetricInfo("0 to 1", "the maximum of the same"),
        "alpha/mean": MetricInfo(
            "",
            "mean over responses of the mean over tokens of the extrapolation `alpha_t = r TVD_t + eps` (constant "
            "weight: `beta0 / beta`)",
        ),
        "alpha/max": MetricInfo("", "the maximum of the same"),
        "beta_t/mean": MetricInfo(
            "", "mean over responses of the mean over tokens of the weight `beta_t = beta0 / alpha_t`"
        ),
        "loss/small_alpha_share": MetricInfo(
            "share",
            "mean over responses of the part of the loss that comes from tokens with `alpha_t < 0.01`, where the "
            "teachers agree and `beta_t` is largest",
        ),
    }
    headline = ("reward/token_mean", "kl/policy_teacher", "loss")

    name: Literal["aligndistil"] = "aligndistil"
    reward: Literal["contrastive", "vanilla"] = "contrastive"
    """The DPO reward: contrastive compares `teacher` with `reverse_teacher` (Eq. 12), vanilla with `reference`."""
    weight: Literal["adaptive", "constant"] = "adaptive"
    """adaptive: alpha_t = r TVD_t + eps and beta_t = beta0 / alpha_t (Eq. 16); constant: beta and beta0 / beta."""
    beta0: float = Field(0.1, gt=0)
    """The beta that the DPO models were trained with."""
    r: float = Field(15.0, ge=0)
    """Slope of the adaptive weight in the total variation distance (factor 1/2 included)."""
    eps: float = Field(0.001, gt=0)
    """Smallest adaptive weight; where both teachers agree beta_t is beta0 / eps."""
    beta: float | None = Field(None, gt=0)
    """KL coefficient of the constant weight; the target extrapolates by beta0 / beta."""

    @model_validator(mode="after")
    def _weight_has_its_own_fields(self) -> AlignDistil:
        if self.weight == "constant":
            if self.beta is None:
                raise ValueError("weight: constant needs `beta`; write for example beta: 0.08")
            defaults = type(self).model_fields
            if unused := [name for name in ("r", "eps") if getattr(self, name) != defaults[name].default]:
                raise ValueError(f"weight: constant does not use {', '.join(sorted(unused))}; remove it")
        elif self.beta is not None:
            raise ValueError("`beta` belongs to weight: constant; the adaptive weight derives it from beta0, r and eps")
        return self

    @property
    def method(self) -> str:
        kinds = [kind for kind in (self.weight, self.reward) if kind in ("constant", "vanilla")]
        return f"{self.title} ({', '.join(kinds)})" if kinds else self.title

    @property
    def needs(self) -> dict[str, Need]:
        return dict.fromkeys((Role.POLICY, Role.TEACHER, self._other), Need.DISTRIBUTION)

    @property
    def _other(self) -> Role:
        return Role.REVERSE_TEACHER if self.reward == "contrastive" else Role.REFERENCE

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        policy, teacher, other = (chunk.logps[role] for role in (Role.POLICY, Role.TEACHER, self._other))
        tvd, alpha = self._weight(teacher, other)
        beta = self.beta0 / alpha
        kl_target = kl_divergence(policy, self._target(teacher, other, alpha))
        return {
            "weighted_kl": beta * kl_target,
            "kl_target": kl_target.detach(),
            "alpha": alpha,
            "beta": beta,
            "tvd": tvd,
        } | self._measured(chunk, policy.detach(), teacher, other)

    def target_logps(self, chunk: TokenChunk) -> Tensor:
        teacher, other = chunk.logps[Role.TEACHER], chunk.logps[self._other]
        return self._target(teacher, other, self._weight(teacher, other)[1])

    def _weight(self, teacher: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) the distance of the two frozen models, and how far the target extrapolates."""
        tvd = total_variation(teacher, other)
        if self.beta is None:
            return tvd, adaptive_alpha(tvd=tvd, r=self.r, eps=self.eps)
        return tvd, torch.full_like(tvd, self.beta0 / self.beta)

    def _target(self, teacher: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
        contrastive = self.reward == "contrastive"
        return extrapolated_logps(teacher_logps=teacher, other_logps=other, alpha=alpha, contrastive=contrastive)

    def _measured(self, chunk: TokenChunk, policy: Tensor, teacher: Tensor, other: Tensor) -> dict[str, Tensor]:
        """What is logged and not trained on: the reward of the token, its expectation, and the KL to the teacher."""
        expected_reward = self.beta0 * (teacher - other).mul_(policy.exp()).sum(-1)
        return {
            "reward": self.beta0 * (chunk.logp[Role.TEACHER] - chunk.logp[self._other]),
            "expected_reward": expected_reward,
            "kl_teacher": kl_divergence(policy, teacher),
        }

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        mask = batch.response_BT
        losses = aligndistil_loss(weighted_kl_BT=terms["weighted_kl"], response_BT=mask)
        small_BT = (terms["alpha"] < _SMALL_ALPHA) * terms["weighted_kl"].detach()
        metrics = {
            **teacher_metrics(reward_BT=terms["reward"], kl_teacher_BT=terms["kl_teacher"], response_BT=mask),
            "reward/expected": mean_of(sum_tokens(terms["expected_reward"], mask)),
            "kl/policy_target": mean_of(sum_tokens(terms["kl_target"], mask)),
            "tvd/mean": mean_of(mean_tokens(terms["tvd"], mask)),
            "alpha/mean": mean_of(mean_tokens(terms["alpha"], mask)),
            "beta_t/mean": mean_of(mean_tokens(terms["beta"], mask)),
            "loss/small_alpha_share": mean_of(sum_tokens(small_BT, mask) / (losses.detach() * batch.length_B + 1e-30)),
        }
        maxima = {"tvd/max": (terms["tvd"] * mask).max(), "alpha/max": (terms["alpha"] * mask).max()}
        return Loss(losses, metrics, maxima)
