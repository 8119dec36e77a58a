"""What each model of a stage that trains adapters is: said before it is loaded."""

from __future__ import annotations

from collections.abc import Callable

from aligndistil.errors import ServiceError
from aligndistil.models import adapter_at, base_of, model_hash
from aligndistil.objectives.base import Role
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.training.python_reward import is_code

Base = tuple[str, bool]
"""By what a base is known, and whether the model is an adapter on it."""


def models_on_bases(stage: Stage, locate: Callable[[str], str]) -> dict[str, str]:
    """What each model of the stage is, by role; empty where it trains no adapters. `locate` gives the folder of a path.

    Raises what `model_hash` raises.
    """
    return _said(stage, lambda path, scalar: _of_files(locate(path), scalar))


def planned_models(stage: Stage, recipe: Recipe) -> dict[str, str]:
    """The same before the stages that it uses are trained."""

    def of_recipe(path: str, scalar: bool) -> Base:
        name = stage_of(path)
        if name is None:
            try:
                return _of_files(path, scalar)
            except ServiceError:  # of a model on the Hub, the name must do
                return path, False
        trained = recipe.stages[name].model
        return (path, False) if trained.lora is None else (of_recipe(trained.path, scalar)[0], True)

    return _said(stage, of_recipe)


def _of_files(path: str, scalar: bool) -> Base:
    adapter = adapter_at(path)
    if adapter is None or not (scalar or adapter.is_of_body_alone):  # which is merged
        return model_hash(path), False
    return model_hash(base_of(path) or path), True


def _said(stage: Stage, base: Callable[[str, bool], Base]) -> dict[str, str]:
    if stage.model.lora is None:
        return {}
    start, needs = stage.model.path, stage.objective.needs
    own, continued = base(start, stage.objective.is_scalar)
    said = {str(Role.POLICY): f"the adapter of {start}, trained further" if continued else f"a new adapter on {start}"}
    for role, path in stage.models.items():
        if is_code(path):
            continue
        theirs, adapter = base(path, needs[role].is_scalar)
        same = theirs == own
        where = "the same base" if same else "a base of its own"
        if role == Role.CRITIC:
            said[role] = f"an adapter and a head of its own, trained on {where}"
        elif adapter:
            said[role] = f"the adapter of {path} on {where}"
        else:
            said[role] = "the base without an adapter" if same else f"{path}, a model of its own"
    return said
