"""The rewards that a recipe's models stand for, and how they rank pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from aligndistil.evaluation.model import PairValues
from aligndistil.evaluation.plan import Plan
from aligndistil.objectives.base import OnPolicy, Role
from aligndistil.recipe import Recipe, Stage

AllPairs: TypeAlias = Mapping[str, Mapping[str, Sequence[PairValues]]]
"""By row of the comparison, then by split: what `Evaluator` measured."""


class Reward(NamedTuple):
    """What a response is worth: the value that row `of` gives it, less that of row `less`."""

    kind: Literal["score", "implicit", "contrastive"]
    of: str
    less: str | None

    @property
    def name(self) -> str:
        return self.of if self.less is None else f"{self.of} / {self.less}"

    def right(self, pairs: AllPairs, split: str) -> str:
        """A 1 for each pair whose chosen response is worth more, else a 0: a tie is wrong."""
        values = pairs[self.of][split]
        others = [(0.0, 0.0)] * len(values) if self.less is None else pairs[self.less][split]
        worth = ((a - c, b - d) for (a, b), (c, d) in zip(values, others, strict=True))
        return "".join("1" if chosen > rejected else "0" for chosen, rejected in worth)


def rewards_of(recipe: Recipe, plan: Plan) -> list[Reward]:
    """Scores, implicit rewards and contrastive ones, each once.

    A scalar head gives a score. A model trained on preferences, away from a reference, gives the log-ratio to it.
    A teacher and its reverse teacher, or two stages that differ in `data.reverse_preferences` only, give a contrastive
    reward. Constant factors (beta) rank no pair differently, and are left out.
    """
    rows = {path: name for name, path in plan.models.items()}
    rewards = [Reward("score", name, None) for name in recipe.stages if name in plan.scalar]
    for of, less in _implicit(recipe):
        if of in rows and less in rows:
            rewards.append(Reward("implicit", rows[of], rows[less]))
    for of, less in _contrasted(recipe):
        if of in rows and less in rows:
            rewards.append(Reward("contrastive", rows[of], rows[less]))
    return list(dict.fromkeys(rewards))


def _implicit(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Paths of models and of what their reward is measured from."""
    for name, stage in recipe.stages.items():
        learns_preferences = stage.objective.on_policy is OnPolicy.NEVER and not stage.objective.is_scalar
        if learns_preferences and not stage.data.reverse_preferences and Role.REFERENCE in stage.models:
            yield f"stage:{name}", stage.models[Role.REFERENCE]


def _contrasted(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for stage in recipe.stages.values():
        if Role.TEACHER in stage.models and Role.REVERSE_TEACHER in stage.models:
            yield stage.models[Role.TEACHER], stage.models[Role.REVERSE_TEACHER]
    for name, stage in recipe.stages.items():
        for other_name, other in recipe.stages.items():
            if not stage.data.reverse_preferences and _is_reverse(other, stage) and not stage.objective.is_scalar:
                yield f"stage:{name}", f"stage:{other_name}"


def _is_reverse(stage: Stage, of: Stage) -> bool:
    turned = of.data.model_copy(update={"reverse_preferences": True})
    same = (stage.objective, stage.model, stage.models) == (of.objective, of.model, of.models)
    return same and (stage.data, stage.train) == (turned, of.train)
