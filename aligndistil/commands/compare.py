"""`aligndistil compare`: a recipe over one or several seeds, or existing runs, as tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich

from aligndistil.commands.launch import must_start, process_count, start, start_side_by_side, stop_timeout_of
from aligndistil.commands.recipes import find_recipe, shipped_recipes
from aligndistil.errors import UserError, for_console
from aligndistil.files import is_partial
from aligndistil.recipe import Recipe, load_recipe
from aligndistil.report import (
    Comparison,
    combine,
    is_run,
    read_runs,
    rich_differences,
    rich_rewards,
    rich_table,
    write_report,
)
from aligndistil.run_folder.outputs import check_folder


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the recipe or the runs."""

    overrides: Sequence[str] = ()
    seeds: int = 1
    out: Path | None = None
    """Where the report goes; null is the run's own `report/`, of several runs `report/` in the current folder."""
    processes: str = "1"
    jobs: int = 1
    """Seeds that are trained at the same time."""
    allow_code: bool = False


def compare(given: Sequence[str], options: Options) -> int:
    """Compare what the arguments name, and print it; the exit code.

    Raises UserError when they are neither one recipe nor runs, and as `run_recipe` and `read_runs` do.
    """
    if options.out is not None:
        check_folder(options.out)
    if len(given) == 1 and not _is_run(given[0]):
        recipe = _find_recipe(given[0])
        if options.jobs > 1 and options.seeds == 1:
            raise UserError(f"--jobs {options.jobs} trains several seeds at the same time: give --seeds too")
        if code := _train(recipe, options):
            return code
        from aligndistil.engine.processes import launched_rank

        if launched_rank() == 0:
            base = load_recipe(recipe, options.overrides).output_dir
            runs = [base] if options.seeds == 1 else [_seed_folder(base, k) for k in range(options.seeds)]
            _report(runs, options.out or base / "report")
        return 0
    _check_runs(given, options)
    runs = [Path(path) for path in given]
    # Where several runs meet, or another program's lies, is not the place of the report.
    own = len(runs) == 1 and is_run(runs[0])
    _report(runs, options.out or (runs[0] / "report" if own else Path("report")))
    return 0


def _report(runs: Sequence[Path], folder: Path) -> None:
    table, logs = combine(read_runs(runs))
    show(table, folder, write_report(folder, table, logs))


def show(table: Comparison, folder: Path, files: Iterable[Path]) -> None:
    """Print a comparison, and where its files are."""
    rewards = rich_rewards(table.rewards) if table.show_rewards and table.rewards else None
    for shown in (rich_table(table), rich_differences(table), rewards):
        if shown is not None:
            rich.print()
            rich.print(shown)
    rich.print()
    names = ", ".join(file.name for file in files)
    rich.get_console().print(for_console(f"report  {folder}/ ({names})"), soft_wrap=True)


def _is_run(name: str) -> bool:
    """A folder, or a file that a training logged; anything else should be a recipe."""
    return Path(name).is_dir() or Path(name).suffix in (".json", ".jsonl")


def _find_recipe(name: str) -> Path:
    written = Path(name).suffix in (".yaml", ".yml")
    if not written and not Path(name).is_file() and name not in shipped_recipes():
        raise UserError(
            f"{name}: there is no such run folder, and no recipe of that name; give a run folder or a recipe "
            "(`aligndistil recipes ls` lists those that come with the package)"
        )
    return find_recipe(Path(name))


def _check_runs(given: Sequence[str], options: Options) -> None:
    for name in given:
        if Path(name).suffix in (".yaml", ".yml"):
            raise UserError(f"{name} is a recipe: compare one recipe, or any number of runs")
    if options.overrides or options.seeds != 1 or options.allow_code or options.processes != "1" or options.jobs != 1:
        raise UserError(
            "--set, --seeds, --processes, --jobs and --allow-code train a recipe; runs are compared as they are"
        )


def _train(path: Path, options: Options) -> int:
    """Train what is not done, a seed after the other; the exit code of what failed."""
    from aligndistil.evaluation.measurements import measurements_of

    recipe = load_recipe(path, options.overrides)
    if measurements_of(recipe) is None:
        raise UserError(f"{path}: no stage has data.eval, so there is nothing to compare on; name held-out data")
    if options.seeds == 1:
        return _run(path, options.overrides, options)
    _check_seeds(recipe, options)
    if options.jobs > 1:
        own = [overrides_of_seed(recipe, options.overrides, k) for k in range(options.seeds)]
        logs = [recipe.output_dir / f"seed-{k}.log" for k in range(options.seeds)]
        commands = [_command(path, one, options) for one in own]
        return start_side_by_side(commands, logs, options.jobs, stop_timeout_of(recipe))
    for k in range(options.seeds):
        rich.print(f"[bold]seed {k}[/] of {options.seeds}: {for_console(_seed_folder(recipe.output_dir, k))}")
        if code := _run(path, overrides_of_seed(recipe, options.overrides, k), options):
            return code
    return 0


def _run(path: Path, overrides: Sequence[str], options: Options) -> int:
    """As `aligndistil train` does, in this process or in several."""
    if must_start(options.processes):
        loaded = load_recipe(path, overrides)
        return start(process_count(options.processes), _command(path, overrides, options), stop_timeout_of(loaded))
    from aligndistil.commands.train import run_recipe

    run_recipe(load_recipe(path, overrides), allow_code=options.allow_code)
    return 0


def _command(path: Path, overrides: Sequence[str], options: Options) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    allowed = ["--allow-code"] if options.allow_code else []
    return ["train", str(path), *settings, *allowed, "--processes", options.processes]


def _seed_folder(base: Path, k: int) -> Path:
    return base / f"seed-{k}"


def overrides_of_seed(recipe: Recipe, overrides: Sequence[str], k: int) -> list[str]:
    """What makes an ordinary run of the k-th seed: its own folder, and every stage's seed k higher."""
    kept = [override for override in overrides if not override.startswith(("train.seed=", "output_dir="))]
    seeds = {name: stage.train.seed + k for name, stage in recipe.stages.items()}
    alone = recipe.written.child("stages") is None
    own = [f"train.seed={seed}" if alone else f"stages.{name}.train.seed={seed}" for name, seed in seeds.items()]
    return [*kept, *own, f"output_dir={json.dumps(str(_seed_folder(recipe.output_dir, k)))}"]


def _check_seeds(recipe: Recipe, options: Options) -> None:
    from aligndistil.engine.processes import launched_world

    if launched_world() > 1:
        raise UserError(
            f"--seeds {options.seeds} needs its own processes: leave the launcher out, and give --processes"
        )
    base = recipe.output_dir
    if (base / "environment.json").is_file():
        raise UserError(
            f"output_dir: {base} holds the run of one seed; move it to {_seed_folder(base, 0)} to go on from it, or "
            "give --set output_dir=ANOTHER"
        )
    entries = list(base.iterdir()) if base.is_dir() else []
    if unknown := [entry.name for entry in entries if not _belongs(entry)]:
        raise UserError(f"output_dir: {base} holds {unknown[0]}, which is no run of ours: give another output_dir")


def _belongs(entry: Path) -> bool:
    name = entry.name
    seed = name.removeprefix("seed-").removesuffix(".log")
    return name == "report" or is_partial(entry) or (name.startswith("seed-") and seed.isdecimal())
