"""What a recipe's comparison measures: which models, on whose data, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from aligndistil.batch import DataKind
from aligndistil.data import gives
from aligndistil.objectives.base import Role
from aligndistil.recipe import CODE, Recipe, Stage, stage_of

INITIAL = "initial"


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a comparison, and what they share. Models are paths of the recipe, `stage:NAME` or others."""

    judge: Stage
    """Its eval data, tokenizer and model settings are everybody's."""
    initial: str
    """What training goes back to."""
    target: str
    """What divergence is measured to."""
    reward: str | None
    """What scores the samples, beside an exact reward."""
    models: dict[str, str]
    """By row, the initial model first."""
    scalar: frozenset[str]
    """Rows whose model has a scalar head."""
    train_pairs: Stage | None
    """Whose training pairs are ranked too; None when the recipe does not ask for it, or has none."""


def plan_of(recipe: Recipe) -> Plan | None:
    """None when no stage has eval data."""
    with_eval = [stage for stage in recipe.stages.values() if stage.data.eval]
    if not with_eval:
        return None
    judge = next((stage for stage in reversed(with_eval) if not stage.objective.is_scalar), with_eval[-1])
    initial = initial_model(recipe, judge)
    return Plan(
        judge=judge,
        initial=initial,
        target=_kl_target(recipe, initial),
        reward=_reward_model(recipe),
        models={INITIAL: initial} | {name: f"stage:{name}" for name in recipe.stages},
        scalar=frozenset(name for name, stage in recipe.stages.items() if stage.objective.is_scalar),
        train_pairs=_with_train_pairs(recipe, judge) if recipe.report.reward_accuracy else None,
    )


def initial_model(recipe: Recipe, stage: Stage) -> str:
    """What the training of a stage goes back to, through the stages it starts from."""
    while (name := stage_of(stage.model.path)) is not None:
        stage = recipe.stages[name]
    return stage.model.path


def _kl_target(recipe: Recipe, initial: str) -> str:
    """As the recipe says, or the teacher of the last stage that has one."""
    teachers = [stage.models[Role.TEACHER] for stage in recipe.stages.values() if Role.TEACHER in stage.models]
    return recipe.report.kl_to or (teachers[-1] if teachers else initial)


def _reward_model(recipe: Recipe) -> str | None:
    """As the recipe says, or the last stage that trains one, or what the last stage that needs one is given."""
    if recipe.report.reward:
        return recipe.report.reward
    trained = [f"stage:{stage.name}" for stage in recipe.stages.values() if stage.objective.is_scalar]
    given = [stage.models[Role.REWARD] for stage in recipe.stages.values() if Role.REWARD in stage.models]
    models = [path for path in given if not path.startswith(CODE)]
    return next(chain(reversed(trained), reversed(models)), None)


def _with_train_pairs(recipe: Recipe, judge: Stage) -> Stage | None:
    stages = (judge, *recipe.stages.values())
    return next((stage for stage in stages if gives(stage.data, "train", DataKind.PAIRS)), None)
