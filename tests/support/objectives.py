"""Every registered objective, and the variants that defaults leave out."""

from __future__ import annotations

from aligndistil.objectives import registry
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.bandit import Bandit
from aligndistil.objectives.base import Objective
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.kto import KTO
from aligndistil.objectives.ppo import PPO
from aligndistil.objectives.rto import RTO
from aligndistil.objectives.simpo import SimPO
from aligndistil.objectives.tdpo import TDPO

VARIANTS = [
    AlignDistil(reward="vanilla", r=3.0),
    AlignDistil(weight="constant", beta=0.08),
    AlignDistil(reward="vanilla", weight="constant", beta=0.08),
    DPO(beta=0.5, label_smoothing=0.1),
    SimPO(beta=2.5, simpo_gamma=1.4),
    TDPO(version=1),
    Bandit(literal=True),
    KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    PPO(kl_coef=0.2, kl_target=6.0, gamma=0.9, reward_clip=None, normalize_reward=True),
    RTO(version="v3", token_reward_clip=0.3, reward_clip=1.0),
]
"""Objectives that the registry's defaults leave out."""

EVERY_OBJECTIVE = [*(cls.example() for cls in registry().values()), *VARIANTS]


def named(objective: Objective) -> str:
    """A test id: the objective and the fields that are not its defaults."""
    return "-".join([objective.name, *(f"{k}={v}" for k, v in objective.model_dump(exclude_defaults=True).items())])


def language_roles(objective: Objective) -> list[str]:
    """Those whose distributions the loss reads, the policy first; none where a scalar head is trained alone."""
    return [role for role, need in objective.update_needs.items() if not need.is_scalar]
