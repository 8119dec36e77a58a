"""The rewards that a recipe's models stand for, and how they rank pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from aligndistil.evaluation.measurements import Measurements
from aligndistil.objectives.base import ImplicitReward, Role
from aligndistil.recipe import Stage


class Reward(NamedTuple):
    """What a response is worth: what row `model` gives it (a score, or log-probability), less what `against` does."""

    kind: Literal["score", "implicit", "contrastive"]
    model: str
    against: str | None

    @property
    def name(self) -> str:
        return self.model if self.against is None else f"{self.model} / {self.against}"

    def right(self, pairs: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], split: str) -> str:
        """A 1 for each pair whose chosen response is worth more, else a 0: a tie is wrong.

        `pairs` are the `EvalResult.pairs` of each row.
        """
        values = pairs[self.model][split]
        others = [(0.0, 0.0)] * len(values) if self.against is None else pairs[self.against][split]
        worth = ((a - c, b - d) for (a, b), (c, d) in zip(values, others, strict=True))
        return "".join("1" if chosen > rejected else "0" for chosen, rejected in worth)


def rewards_of(measurements: Measurements) -> list[Reward]:
    """Scores, implicit rewards and contrastive ones, each once.

    A scalar head gives a score. A model whose objective says so gives the log-ratio to its reference. A teacher and its
    reverse teacher, or two stages that differ in `data.reverse_preferences` only, give a contrastive reward. Constant
    factors (beta) rank no pair differently, and are left out.
    """
    stages, rows = measurements.recipe.stages, {path: name for name, path in measurements.models.items()}
    as_they_are = {name: stage for name, stage in stages.items() if not stage.data.reverse_preferences}
    implicit = [
        (f"stage:{name}", stage.models[Role.REFERENCE])
        for name, stage in as_they_are.items()
        if stage.objective.implicit_reward is ImplicitReward.LOG_RATIO and Role.REFERENCE in stage.models
    ]
    contrastive = [
        (stage.models[Role.TEACHER], stage.models[Role.REVERSE_TEACHER])
        for stage in stages.values()
        if Role.TEACHER in stage.models and Role.REVERSE_TEACHER in stage.models
    ]
    contrastive += [
        (f"stage:{name}", f"stage:{other.name}")
        for name, stage in as_they_are.items()
        for other in stages.values()
        if not stage.objective.is_scalar and _is_reverse(other, stage)
    ]
    rewards = [Reward("score", name, None) for name in stages if name in measurements.scalar]
    rewards += [Reward("implicit", rows[a], rows[b]) for a, b in implicit if a in rows and b in rows]
    rewards += [Reward("contrastive", rows[a], rows[b]) for a, b in contrastive if a in rows and b in rows]
    return list(dict.fromkeys(rewards))


def _is_reverse(stage: Stage, of: Stage) -> bool:
    turned = of.data.model_copy(update={"reverse_preferences": True})
    same = (stage.objective, stage.model, stage.models) == (of.objective, of.model, of.models)
    return same and (stage.data, stage.train) == (turned, of.train)
