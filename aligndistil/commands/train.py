"""The stages of a recipe in order: skip what is done, continue what was interrupted, train the rest; then compare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rich
import torch

from aligndistil.commands.compare import show
from aligndistil.commands.contradictions import contradictions
from aligndistil.commands.data_checks import read_stages
from aligndistil.commands.estimate import named_memory
from aligndistil.commands.judging import judge_of, judging_of
from aligndistil.commands.measure import WrittenComparison, compare_models, locate
from aligndistil.commands.standing import Standing, fingerprint_of, standing
from aligndistil.engine.checkpoint import checkpoints
from aligndistil.engine.config import check_deepspeed, import_deepspeed
from aligndistil.engine.processes import Processes, launched_rank, launched_world, process_group
from aligndistil.errors import Interrupted, ServiceError, UserError, for_console
from aligndistil.evaluation.measurements import initial_model
from aligndistil.files import remove_folder
from aligndistil.models import check_lora, check_weights, model_exists, model_hash, pick_dtype, whole_base_of
from aligndistil.objectives.base import Role
from aligndistil.progress import RunView
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.run_folder import Done, Environment, RunFolder, StageFolder, setup_logging, sizes_and_times
from aligndistil.run_folder.trackers import check_trackers
from aligndistil.stop import StopSignal
from aligndistil.training import StageTraining, is_code, source_of


@dataclass(frozen=True, slots=True)
class Finished:
    """What `run_recipe` leaves behind."""

    run: Path
    models: dict[str, Path]
    """The final model of every stage that was asked for; that which the recipe is about comes last."""
    comparison: WrittenComparison | None
    """None when the recipe has no eval data, or not all of its stages were asked for."""

    @property
    def final(self) -> Path:
        """The model that the recipe is about."""
        return list(self.models.values())[-1]


def train(recipe: Recipe, *, stage: str | None, fresh: bool, verify: bool, allow_code: bool) -> None:
    """Run the recipe in this process, and show what came out."""
    finished = run_recipe(recipe, stage=stage, fresh=fresh, verify=verify, allow_code=allow_code)
    if launched_rank() != 0:
        return
    if finished.comparison is not None:
        show(finished.comparison.table, finished.run / "report", finished.comparison.files)
    *others, last = finished.models.items()
    lines = [f"        {path} ({name})" for name, path in others]
    for line in [*lines, f"model   {last[1]} ({last[0]})" if others else f"model   {last[1]}"]:
        rich.get_console().print(for_console(line), soft_wrap=True)


def run_recipe(
    recipe: Recipe,
    *,
    stage: str | None = None,
    fresh: bool = False,
    verify: bool = False,
    allow_code: bool = False,
) -> Finished:
    """Train every stage of a recipe (or one stage and what it depends on) that is not finished, then compare.

    `fresh` trains again what is finished; `verify` reads its models, and trains again what is not as it was left;
    `allow_code` permits rewards that are Python functions. Raises UserError for mistakes of the recipe that only show
    with the data, the models or the processes at hand.
    """
    wanted, lines, judging = stages_wanted(recipe, stage), dict[str, list[str]](), None
    problem: UserError | None = None
    try:
        import_deepspeed()
        check_recipe(recipe, launched_world())
        _check_code(recipe, allow_code)
        # A process group would not wait for a large source, so there is none yet.
        lines = _read_data(recipe, wanted)
        judging = None if stage else judging_of(recipe)
    except UserError as error:
        problem = error
        if launched_world() == 1:
            raise
    run = RunFolder(recipe.output_dir)
    minutes = max(recipe.stages[name].engine.timeout_minutes for name in wanted)
    with ExitStack() as stack:
        processes = stack.enter_context(process_group(minutes))
        processes.agree(problem)
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

        def open_run() -> None:
            stack.enter_context(run.alone(recipe.name))
            run.open(recipe.name, recipe.source_text, Environment.collect(world_size=processes.world, devices=devices))

        processes.on_main(open_run)
        weights: dict[str, str] = {}
        graph = {name: recipe.stages[name].inputs for name in wanted}
        headlines = {name: recipe.stages[name].objective.headline for name in wanted}
        stop = StopSignal()
        with RunView(recipe.name, graph, headlines, rank=processes.rank) as view:
            for name in wanted:
                weights[name] = _run_stage(
                    recipe, name, run, processes, stop, weights, fresh, verify, view, lines[name]
                )
                _stop_between_stages(processes, stop, name)
        # Not inside: what has been measured is kept, so SIGTERM may simply end a comparison.
        comparison = None if stage else compare_models(recipe, run, processes, weights, judging)
        about = stage or subject_of(recipe)
        models = {name: run.stage(name).final for name in wanted if name != about}
        return Finished(run.path, {**models, about: run.stage(about).final}, comparison)


def _read_data(recipe: Recipe, wanted: Sequence[str]) -> dict[str, list[str]]:
    """What is to be said of each stage's data, all of which is read before the first is trained.

    Says what contradicts itself in the recipe. Raises UserError when a stage must not start with its data.
    """
    lines, read = {}, read_stages(recipe, wanted, rank=launched_rank())
    for name, of_stage in read.items():
        if isinstance(of_stage, ServiceError):
            raise of_stage
        lines[name] = of_stage.lines
    if launched_rank() == 0:
        for line in contradictions(recipe, read):
            _print(f"[yellow]![/] {for_console(line)}")
    return lines


def subject_of(recipe: Recipe) -> str:
    """The stage that a recipe is about: its last one, but rather one that others do not start or learn from, rather a
    language model than a scalar head, and rather one that learnt preferences as they are than reversed.
    """
    used = {name for stage in recipe.stages.values() for name in stage.inputs}

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        stage = recipe.stages[name]
        of_use = not stage.data.reverse_preferences, not stage.objective.is_scalar, name not in used
        return (*of_use, list(recipe.stages).index(name))

    return max(recipe.stages, key=rank)


def _stop_between_stages(processes: Processes, stop: StopSignal, finished: str) -> None:
    if any(processes.gather(stop.requested)):
        sentence = f"stopped after stage {finished}, which is finished; run the same command to go on"
        raise Interrupted(sentence, stop.exit_code)


def check_recipe(recipe: Recipe, processes: int) -> None:
    """What can be known before anything is loaded: batches divide, and local models exist."""
    checked = set[tuple[str, bool, bool]]()
    for stage in recipe.stages.values():
        stage.check_processes(processes)
        check_trackers(stage.logging.trackers, stage.where("logging", "trackers"))
        try:
            check_deepspeed(stage, pick_dtype(stage.model.dtype))
        except UserError as error:
            at = stage.where("engine", "deepspeed")
            raise type(error)(f"{at}: {str(error).removeprefix('engine.deepspeed: ')}") from None
        named = {("model", "path"): stage.model.path} | {("models", role): p for role, p in stage.models.items()}
        for where, path in named.items():
            if stage_of(path) is not None or is_code(path):
                continue
            _with_position(stage.where(*where), path)
            role = Role.POLICY if where[0] == "model" else where[1]
            check = (path, stage.objective.needs[role].is_scalar, role in (Role.POLICY, Role.CRITIC))
            if check not in checked:
                checked.add(check)
                fits = functools.partial(check_weights, section=stage.model, scalar=check[1], trained=check[2])
                _with_position(stage.where(*where), path, fits)
        if stage.model.lora is not None:
            _check_lora(recipe, stage)
    report = recipe.report
    for key, given in (("kl_to", report.kl_to), ("reward", report.reward), ("against", report.against)):
        if given is not None and is_code(given):
            raise UserError(f"{recipe.where('report', key)}: name a model; a Python function scores only in training")
        if given is not None and stage_of(given) is None:
            _with_position(recipe.where("report", key), given)
    if report.judge is not None and report.benchmarks:
        _with_position(recipe.where("report", "judge"), report.judge, lambda _: judge_of(recipe))


def _check_lora(recipe: Recipe, stage: Stage) -> None:
    """Adapters need a package, layers that there are, and where another stage's are trained further, its fields."""
    where, lora, name = stage.where("model", "lora"), stage.model.lora, stage_of(stage.model.path)
    before = None if name is None else recipe.stages[name].model.lora
    assert lora is not None
    for field in ("r", "alpha", "target_modules") if before is not None else ():
        if (theirs := getattr(before, field)) != (ours := getattr(lora, field)):
            raise UserError(
                f"{where}: training goes on with the adapter of {stage.model.path}, which has {field}: {theirs} and "
                f"not {ours}; write the same, or start from the whole model that `aligndistil merge` makes of it"
            )
    root = initial_model(recipe, stage)
    try:
        check_lora(root if before is None else whole_base_of(root), stage.model, scalar=stage.objective.is_scalar)
    except UserError as error:
        at = stage.where("model", "lora", "target_modules") if "target_modules" in str(error) else where
        said = str(error).removeprefix("model.lora: ").removeprefix("model.lora.target_modules: ")
        raise type(error)(f"{at}: {said}") from None


def _check_code(recipe: Recipe, allowed: bool) -> None:
    """Rewards that are Python functions need a permission, and are imported before anything is trained."""
    for stage in recipe.stages.values():
        for role, path in stage.models.items():
            if is_code(path):
                where = stage.where("models", role)
                if not allowed:
                    raise UserError(f"{where}: {path} is Python code; add --allow-code to run it")
                _with_position(where, path, source_of)


def _with_position(where: str, path: str, check: Callable[[str], object] = model_exists) -> None:
    try:
        check(path)
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None


def stages_wanted(recipe: Recipe, stage: str | None) -> list[str]:
    """Names of the stages to run, in order: all of them, or one with what it depends on."""
    if stage is None:
        return list(recipe.stages)
    if stage not in recipe.stages:
        raise UserError(f"--stage {stage}: the recipe has no such stage; it has {', '.join(recipe.stages)}")
    needed, waiting = set[str](), [stage]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += recipe.stages[name].inputs
    return [name for name in recipe.stages if name in needed]


def _run_stage(
    recipe: Recipe,
    name: str,
    run: RunFolder,
    processes: Processes,
    stop: StopSignal,
    weights: dict[str, str],
    fresh: bool,
    verify: bool,
    view: RunView,
    lines: Sequence[str],
) -> str:
    """Train the stage unless it is done; what its final model's weights are called, as are those in `weights`."""
    stage, folder = recipe.stages[name], run.stage(name)
    fingerprint = fingerprint_of(stage, folder, weights)
    processes.barrier()
    found = standing(stage, folder, weights, fingerprint, fresh=fresh, verify=verify, processes=processes)
    if found.action == "skip" and found.done is not None:
        _say(processes, f"[green]✓[/] [bold]{name}[/]: {for_console(found.why)}")
        view.finish(name, found.done.step, found.done.seconds, found.done.metrics)
        processes.on_main(lambda: _remove_automatic_checkpoints(stage, folder))  # a kill may have come before
        return found.done.weights
    # The data may be refused: nothing of an earlier run is moved before it is accepted.
    initial = initial_model(recipe, stage)
    training = StageTraining(stage, folder, lambda path: locate(run, path), processes, initial)
    processes.on_main(lambda: _make_room(stage, folder, found, fingerprint))
    setup_logging(processes.rank, folder.log_file(processes.rank))
    _announce(stage, training, processes, lines)
    with named_memory(stage, lambda path: locate(run, path), processes.world):
        outcome = training.run(stop, view)
    view.finish(name, outcome.steps, outcome.seconds, outcome.metrics)
    became: str = processes.gather(model_hash(str(folder.final)) if processes.is_main else "")[0]
    if processes.is_main:
        folder.write_done(
            Done(
                fingerprint=fingerprint,
                weights=became,
                files=sizes_and_times(folder.final),
                inputs={one: weights[one] for one in stage.inputs},
                step=outcome.steps,
                seconds=outcome.seconds,
                metrics=outcome.metrics,
                resolved=stage.resolved(),
            )
        )
        _remove_automatic_checkpoints(stage, folder)
    processes.barrier()
    return became


def _remove_automatic_checkpoints(stage: Stage, folder: StageFolder) -> None:
    """Nobody asked for those of a finished stage, and there is nothing to go on with."""
    if stage.checkpoint.every == "auto":
        for checkpoint in checkpoints(folder.path):
            remove_folder(checkpoint)


def _make_room(stage: Stage, folder: StageFolder, found: Standing, fingerprint: str) -> None:
    """Keep what an interrupted run of the same stage left; rename the folder of another version of it."""
    moved = folder.archive() if found.action == "train" else None
    if moved is not None or found.action == "continue":
        why = f"{found.why}; the old folder is kept as {moved}" if moved else found.why
        _print(f"[yellow]↻[/] [bold]{stage.name}[/]: {for_console(why)}")
    folder.clear_unfinished()
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_started(fingerprint)
    folder.write_resolved(stage.resolved())


def _announce(stage: Stage, training: StageTraining, processes: Processes, lines: Sequence[str]) -> None:
    """Say what is about to be trained, and above all what it is compared with."""
    compared = ", ".join(f"{role} {path}" for role, path in stage.models.items())
    how = "on-policy" if stage.on_policy else f"on {training.data.train.kind}"
    what = (
        f"{stage.objective.name} from {stage.model.path}"
        + (f" against {compared}" if compared else "")
        + f", {how}, {len(training.data.train)} examples, {training.schedule.total_steps} steps of "
        f"{stage.train.batch_size}"
    )
    _say(processes, f"[cyan]▶[/] [bold]{stage.name}[/]: {for_console(what)}")
    for role, what in training.held.items():
        _say(processes, f"  {role.replace('_', ' ')}: {for_console(what)}")
    for line in lines:
        _say(processes, f"  {for_console(line)}")


def _say(processes: Processes, text: str) -> None:
    """Console markup, on the first process."""
    if processes.is_main:
        _print(text)


def _print(text: str) -> None:
    """On a terminal lines are broken between words; in a file they are whole."""
    console = rich.get_console()
    console.print(text, soft_wrap=not console.is_terminal)
