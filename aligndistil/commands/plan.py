"""`aligndistil train --dry-run`: what would be trained, and the memory that it needs, without training."""

from __future__ import annotations

from collections.abc import Iterator, Set

from rich.console import RenderableType

from aligndistil.commands.data_checks import ReadStage, read_stages
from aligndistil.commands.estimate import Memory, ModelSize, configuration, cost, cost_at_most, memory, model_size
from aligndistil.commands.train import check_recipe, stages_wanted
from aligndistil.errors import ServiceError, for_console
from aligndistil.evaluation.measurements import initial_model
from aligndistil.recipe import Recipe, Stage, changed_sections, stage_of
from aligndistil.run_folder import Done, RunFolder
from aligndistil.training import is_code


def plan(recipe: Recipe, only: str | None, processes: int) -> Iterator[RenderableType]:
    """What `train` would do: state, models, steps, tokens and memory of each stage."""
    check_recipe(recipe, processes)
    run = RunFolder(recipe.output_dir)
    unread: set[str] = set()
    trained: set[str] = set()
    wanted = stages_wanted(recipe, only)
    read = read_stages(recipe, wanted)
    for name in wanted:
        stage, done = recipe.stages[name], run.stage(name).read_done()
        again = [] if done is None else _why_again(stage, done, trained)
        if done is None or again:
            trained.add(name)
        state = "to train" if done is None else for_console("; ".join(again)) or "was trained before"
        yield f"[bold]{name}[/]: {stage.objective.name}, {state}"
        sizes = _sizes(recipe, stage, unread)
        yield f"  models  {_shown(stage, sizes)}"
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


def _why_again(stage: Stage, done: Done, trained: Set[str]) -> list[str]:
    """What the recipe says otherwise than when the stage was trained; contents of data and models are not compared."""
    changes = changed_sections(done.resolved, stage.resolved(), scalar=stage.objective.is_scalar)
    changes += [f"{name}, which it depends on, is trained" for name in stage.inputs if name in trained]
    return [f"to train again because {changes[0]}", *changes[1:]] if changes else []


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
