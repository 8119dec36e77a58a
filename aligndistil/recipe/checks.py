"""What the sections of a stage demand of each other."""

from __future__ import annotations

from collections.abc import Mapping

from aligndistil.objectives.base import Objective, OnPolicy, Prepares, Role
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


CODE = "python:"
"""How the path of a reward starts that is a function instead of a model."""


def named_roles(objective: Objective) -> list[str]:
    """The roles that `models` must name."""
    return [str(role) for role in objective.needs if role != Role.POLICY]


def models_needed(
    objective: Objective, models: Models, own: Node, merged: Node, problems: list[Problem]
) -> dict[str, str]:
    """The models of just the roles that the objective needs. `own` is what the stage wrote, without defaults."""
    needed = named_roles(objective)
    given = {key: path for key, path in models.model_dump().items() if path is not None}
    for role in needed:
        if role not in given:
            text = f"`{objective.name}` needs this model: give a folder, a Hub id, `builtin:NAME` or `stage:NAME`"
            place = own if own.child("models") is not None else merged
            node, _ = place.deepest(("models",))
            path = node.path if node.path[-1:] == ("models",) else (*own.path, "models")
            problems.append(Problem(node.at, (*path, role), text))
    for role in given:
        if role not in needed and own.find(("models", role)) is not None:
            reads = f"it reads {listed(needed)}" if needed else "it compares with no other model"
            text = f"`{objective.name}` does not read this model ({reads}); remove the line"
            problems.append(_at_key(own, ("models", role), text))
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
    if rollout is not None and objective.prepares is not Prepares.ROLLOUT:
        return rollout.model_copy(update={"responses": None, "epochs": 1})  # a default of other stages
    return rollout


def check_kinds(
    objectives: Mapping[str, Objective], references: Mapping[str, list[Node]], problems: list[Problem]
) -> None:
    """A stage that trains a scalar head ends with no language model, and the other way round."""
    for nodes in references.values():
        for node in nodes:
            source = objectives.get(str(node.value).removeprefix("stage:"))
            role = str(node.path[-1])
            if source is None:
                continue
            if role == Role.REWARD and not source.is_scalar:
                text = (
                    f"`{source.name}` trains a language model, which has no scalar head; name a stage that trains one"
                )
                problems.append(Problem(node.value_at, node.path, text))
            if role in (Role.REFERENCE, Role.TEACHER, Role.REVERSE_TEACHER, "path", "kl_to") and source.is_scalar:
                text = f"`{source.name}` trains a scalar head, not a language model; name a stage that trains one"
                problems.append(Problem(node.value_at, node.path, text))


def check_code(models: Models, merged: Node, problems: list[Problem]) -> None:
    """Only a reward may be a function."""
    for key, path in models.model_dump().items():
        if path is None or not path.startswith(CODE):
            continue
        if key != Role.REWARD:
            text = "only `reward` may be a Python function; name a model"
            problems.append(_at_value(merged, ("models", key), text))
        elif len(path.split(":")) != 3 or not all(path.split(":")):
            problems.append(_at_value(merged, ("models", key), "write `python:MODULE:FUNCTION`"))


def critic_allowed(objective: Objective, train: Train, own: Node, problems: list[Problem]) -> Train:
    """The settings of training, without the critic's for objectives that have none."""
    if Role.CRITIC in objective.needs:
        return train
    if own.find(("train", "critic_learning_rate")) is not None:
        text = f"`{objective.name}` trains no critic; remove the line"
        problems.append(_at_key(own, ("train", "critic_learning_rate"), text))
    return train.model_copy(update={"critic_learning_rate": None})


def check_preparation(
    objective: Objective, train: Train, rollout: Rollout | None, own: Node, merged: Node, problems: list[Problem]
) -> None:
    """Mismatched rows need another example; several steps on one rollout need an objective that corrects for it."""
    if objective.prepares is Prepares.MISMATCHED and train.batch_size < 2:
        text = f"`{objective.name}` compares each prompt with the response of another example: write 2 or more"
        problems.append(_at_value(merged, ("train", "batch_size"), text))
    if rollout is None:
        return
    reuses = objective.prepares is Prepares.ROLLOUT
    for key, once in (("responses", None), ("epochs", 1)):
        given = own.find(("rollout", key))
        if not reuses and given is not None and given.value != once:
            text = f"`{objective.name}` takes one optimizer step on each rollout; remove the line"
            problems.append(_at_key(own, ("rollout", key), text))
    responses = rollout.responses or train.batch_size
    if reuses and responses % train.batch_size:
        text = f"{responses} is not a multiple of train.batch_size, {train.batch_size}"
        problems.append(_at_value(merged, ("rollout", "responses"), text))


def check_teacher_cache(objective: Objective, rollout: Rollout | None, own: Node, problems: list[Problem]) -> None:
    """Hidden states can be kept only of rows that are known beforehand."""
    at = ("engine", "teacher_cache")
    asked = own.find(at)
    if asked is None or asked.value is False:
        return
    if rollout is not None:
        problems.append(_at_key(own, at, "the responses of this stage are sampled while it trains; remove the line"))
    elif objective.prepares is not Prepares.NOTHING or not named_roles(objective):
        reason = "reads no frozen model on the rows of the data alone"
        problems.append(_at_key(own, at, f"`{objective.name}` {reason}; remove the line"))


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
