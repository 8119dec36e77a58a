"""`aligndistil train --dry-run`: what would be trained, and the memory that it needs, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from rich.console import RenderableType

from aligndistil.commands.contradictions import contradictions
from aligndistil.commands.data_checks import ReadStage, read_stages
from aligndistil.commands.estimate import Memory, ModelSize, configuration, cost, cost_at_most, memory, model_size
from aligndistil.commands.standing import Standing, fingerprint_of, standing
from aligndistil.commands.train import check_recipe, stages_wanted
from aligndistil.engine.processes import Processes
from aligndistil.errors import ServiceError, for_console
from aligndistil.evaluation.measurements import initial_model
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.run_folder import RunFolder
from aligndistil.training import is_code, planned_models


def plan(
    recipe: Recipe,
    only: str | None,
    processes: int,
    *,
    fresh: bool = False,
    verify: bool = False,
    allow_code: bool = False,
) -> Iterator[RenderableType]:
    """What `train` would do: state, models, steps, tokens and memory of each stage."""
    check_recipe(recipe, processes)
    RunFolder(recipe.output_dir).check(recipe.name)
    unread: set[str] = set()
    weights: dict[str, str | None] = {}
    wanted = stages_wanted(recipe, only)
    read = read_stages(recipe, wanted)
    yield from (f"[yellow]![/] {for_console(line)}" for line in contradictions(recipe, read))
    for name in wanted:
        stage, found = recipe.stages[name], _standing(recipe, name, weights, fresh, verify, allow_code)
        weights[name] = found.done.weights if found.action == "skip" and found.done is not None else None
        yield f"[bold]{name}[/]: {stage.objective.name}, {for_console(found.why)}"
        sizes = _sizes(recipe, stage, unread)
        yield f"  models  {_shown(stage, sizes)}"
        held = planned_models(stage, recipe)
        yield from (f"          {role.replace('_', ' ')}: {for_console(what)}" for role, what in held.items())
        yield f"  data    {_taken(recipe, stage, read[name], unread)}"
        if isinstance(of_stage := read[name], ReadStage):
            yield from (f"          {for_console(line)}" for line in of_stage.lines)
        if sizes is not None:
            policy, others = sizes
            yield f"  memory  {_needed(memory(stage, policy, others, processes))}"
    if unread:
        yield (
            "The Hub cannot be reached: sizes of its models and numbers of its rows are those that this package knows, "
            "and every row counts as usable and as long as the recipe allows."
        )
    yield "Nothing was trained. Memory is an estimate, for the longest rows that the recipe allows, one GPU a process."


def _standing(
    recipe: Recipe, name: str, weights: Mapping[str, str | None], fresh: bool, verify: bool, allow_code: bool
) -> Standing:
    """What becomes of a stage, as far as it can be known without the Hub and without somebody's code."""
    stage, folder = recipe.stages[name], RunFolder(recipe.output_dir).stage(name)
    there = folder.path.is_dir() and any(folder.path.iterdir())
    if not allow_code and any(map(is_code, stage.models.values())):
        unknown = "with --allow-code it is said whether it is trained again"
        return Standing("train", unknown if there else "to train", None)
    try:
        fingerprint = fingerprint_of(stage, folder, weights)
    except ServiceError:
        unknown = "trained again if anything changed, which the Hub cannot be reached to say"
        return Standing("train", unknown if there else "to train", None)
    alone = Processes(0, 1, torch.device("cpu"))
    return standing(stage, folder, weights, fingerprint, fresh=fresh, verify=verify, processes=alone)


def _needed(m: Memory) -> str:
    parts = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "DeepSpeed's buffers": m.buffers,
        "frozen models": m.frozen,
        "activations": m.activations,
        "logits": m.logits,
    }
    held = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    sampling = f"; while sampling {m.generation:.2f} instead of the last two" if m.generation else ""
    return f"{m.total:.2f} GiB a process: {held}{sampling}"


def _sizes(recipe: Recipe, stage: Stage, unread: set[str]) -> tuple[ModelSize, dict[str, ModelSize]] | None:
    """None where a configuration is on the Hub and neither the Hub nor this package gives it."""
    objective, trust = stage.objective, stage.model.trust_remote_code

    def size(path: str, *, scalar: bool) -> ModelSize:
        name = stage_of(path)
        root = path if name is None else initial_model(recipe, recipe.stages[name])
        if isinstance(configuration(root, trust), ServiceError):
            unread.add(root)
        return model_size(root, scalar=scalar, trust_remote_code=trust)

    try:
        policy = size(stage.model.path, scalar=objective.is_scalar)
        models = {role: path for role, path in stage.models.items() if not is_code(path)}
        return policy, {role: size(path, scalar=objective.needs[role].is_scalar) for role, path in models.items()}
    except ServiceError:
        return None


def _shown(stage: Stage, sizes: tuple[ModelSize, dict[str, ModelSize]] | None) -> str:
    if sizes is None:
        return "unknown: a configuration is on the Hub, which cannot be reached"
    policy, others = sizes
    models = [f"policy {for_console(stage.model.path)} ({_millions(policy)})"]
    for role, path in stage.models.items():
        size = f" ({_millions(others[role])})" if role in others else ""
        models.append(f"{role.replace('_', ' ')} {for_console(path)}{size}")
    return ", ".join(models)


def _millions(size: ModelSize) -> str:
    return f"{size.parameters / 1e6:,.1f} M"


def _taken(recipe: Recipe, stage: Stage, read: ReadStage | ServiceError, unread: set[str]) -> str:
    """Examples, steps and tokens of training; where the Hub does not give the data, no more than there can be."""
    taken = None
    if isinstance(read, ReadStage):
        taken = cost(stage, read.data.train)
    elif not unread & {initial_model(recipe, stage)}:
        unread |= {source.path for source in stage.data.train}
    taken = taken or cost_at_most(stage)
    if taken is None:
        steps = f"{stage.train.max_steps} steps" if stage.train.max_steps else f"{stage.train.epochs:g} epoch(s)"
        return f"{steps} of {stage.train.batch_size}; the data or the tokenizer are on the Hub, which cannot be reached"
    sampled = f" and up to {taken.sampled:,} sampled" if taken.sampled else ""
    at_most = "" if taken.exact else "at most "
    return (
        f"{at_most}{taken.examples:,} {taken.kind}, {taken.steps:,} steps of {stage.train.batch_size}, "
        f"{at_most}{taken.tokens:,} tokens{sampled}"
    )
