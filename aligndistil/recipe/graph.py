"""`stage:NAME` references are the graph of a recipe's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from aligndistil.recipe.describe import Problem
from aligndistil.recipe.nearest import guess_and_list
from aligndistil.recipe.yaml_positions import Node

PREFIX = "stage:"

References: TypeAlias = Mapping[str, Sequence[Node]]
"""Each stage's model paths that name another stage, as they were written."""


def stage_of(path: str) -> str | None:
    """`dpo` of `stage:dpo`; None for any other path."""
    return path.removeprefix(PREFIX) if path.startswith(PREFIX) else None


def references_of(stage: Node) -> list[Node]:
    """Model paths of a stage that are references."""
    candidates = [stage.find(("model", "path"))]
    models = stage.child("models")
    candidates += (models.mapping or {}).values() if models is not None else []
    return [node for node in candidates if node is not None and str(node.value).startswith(PREFIX)]


def unknown_stage(reference: Node, stages: Sequence[str]) -> Problem | None:
    """A problem when a reference names no stage."""
    name = str(reference.value).removeprefix(PREFIX)
    if name in stages:
        return None
    text = f"no stage is named `{name}`{guess_and_list(name, stages, 'stages')}"
    return Problem(reference.value_at, reference.path, text)


def ordered(references: References) -> list[str]:
    """Stage names, each after those it refers to; file order where that leaves a choice.

    Stages of a circle, and stages that wait for them, are left out.
    """
    waiting = dict(references)
    order: list[str] = []
    while ready := next((name for name in waiting if not _unmet(waiting[name], waiting)), None):
        order.append(ready)
        del waiting[ready]
    return order


def circle(references: References) -> Problem | None:
    """A problem when stages wait for each other."""
    done = set(ordered(references))
    waiting = {name: nodes for name, nodes in references.items() if name not in done}
    if not waiting:
        return None
    seen: list[str] = []
    name = next(iter(waiting))
    while name not in seen:
        seen.append(name)
        name = str(_unmet(waiting[name], waiting)[0].value).removeprefix(PREFIX)
    seen = [*seen[seen.index(name) :], name]
    first = _unmet(waiting[name], waiting)[0]
    text = f"the stages wait for each other in a circle: {' -> '.join(seen)}"
    return Problem(first.value_at, first.path, text)


def _unmet(references: Sequence[Node], waiting: Mapping[str, object]) -> list[Node]:
    return [node for node in references if str(node.value).removeprefix(PREFIX) in waiting]
