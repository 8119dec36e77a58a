"""What the sections of a stage demand of each other."""

from __future__ import annotations

from aligndistil.objectives.base import Objective, OnPolicy, Role
from aligndistil.recipe.describe import Problem
from aligndistil.recipe.nearest import listed
from aligndistil.recipe.sections import Data, Evaluation, Models, Rollout, Train
from aligndistil.recipe.yaml_positions import KeyPath, Node


def _at_value(node: Node, path: KeyPath, text: str) -> Problem:
    found, rest = node.deepest(path)
    return Problem(found.at if rest else found.value_at, (*found.path, *rest), text)


def _at_key(node: Node, path: KeyPath, text: str) -> Problem:
    found, rest = node.deepest(path)
    return Problem(found.at, (*found.path, *rest), text)


def frozen_roles(objective: Objective) -> list[Role]:
    """The roles that `models` must name."""
    return [role for role in objective.needs if role is not Role.POLICY]


def models_needed(
    objective: Objective, models: Models, own: Node, merged: Node, problems: list[Problem]
) -> dict[Role, str]:
    """The models of just the roles that the objective needs. `own` is what the stage wrote, without defaults."""
    needed = frozen_roles(objective)
    given = {Role(key): path for key, path in models.model_dump().items() if path is not None}
    for role in needed:
        if role not in given:
            text = f"`{objective.name}` needs this model: give a folder, a Hub id, `builtin:NAME` or `stage:NAME`"
            place = own if own.child("models") is not None else merged
            node, _ = place.deepest(("models",))
            path = node.path if node.path[-1:] == ("models",) else (*own.path, "models")
            problems.append(Problem(node.at, (*path, role.value), text))
    for role in given:
        if role not in needed and own.find(("models", role.value)) is not None:
            reads = f"it reads {listed(needed)}" if needed else "it compares with no other model"
            text = f"`{objective.name}` does not read this model ({reads}); remove the line"
            problems.append(_at_key(own, ("models", role.value), text))
    return {role: given[role] for role in needed if role in given}


def rollout_allowed(
    objective: Objective, rollout: Rollout | None, own: Node, merged: Node, problems: list[Problem]
) -> Rollout | None:
    """The rollout of a stage whose objective may sample, and None for others."""
    if objective.on_policy is OnPolicy.NEVER:
        if own.child("rollout") is not None:
            text = f"`{objective.name}` learns from data alone and samples nothing; remove this section"
            problems.append(_at_key(own, ("rollout",), text))
        return None
    if objective.on_policy is OnPolicy.ALWAYS and rollout is None:
        text = f"`{objective.name}` learns from its own samples; write for example `rollout: {{max_new_tokens: 256}}`"
        problems.append(Problem(merged.at, (*own.path, "rollout"), text))
    return rollout


def check_batch(train: Train, rollout: Rollout | None, merged: Node, problems: list[Problem]) -> None:
    """The batch must divide into micro-batches, and into the samples of its prompts."""
    place = ("train", "batch_size")
    if train.batch_size % train.micro_batch_size:
        text = f"{train.batch_size} is not a multiple of train.micro_batch_size, {train.micro_batch_size}"
        problems.append(_at_value(merged, place, text))
    if rollout is not None and train.batch_size % rollout.samples_per_prompt:
        text = f"{train.batch_size} is not a multiple of rollout.samples_per_prompt, {rollout.samples_per_prompt}"
        problems.append(_at_value(merged, place, text))


def check_evaluation(evaluation: Evaluation, data: Data, merged: Node, problems: list[Problem]) -> None:
    """Periodic evaluation and samples need evaluation data."""
    if data.eval is not None:
        return
    for key, asked in (("every", evaluation.every), ("samples", evaluation.samples)):
        if asked:
            text = "there is nothing to evaluate on; name it in data.eval"
            problems.append(_at_value(merged, ("evaluation", key), text))
