"""Existing runs, ours and transformers', as comparisons that can be put together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligndistil.errors import UserError
from aligndistil.report.logs import METRICS, STATE, Log, read_logs, seed_folders
from aligndistil.report.results import STEPS, Comparison, ModelResult, load_results, read_measured
from aligndistil.run_folder import Done, RunFolder

REPORT = Path("report") / "comparison.json"
ACCURACY = "rewards/accuracies"
LOOKED_AT = ("checkpoint", "logging", "evaluation", "engine")
"""Sections of a stage that do not say what is trained."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training of every row, with one seed."""

    path: Path
    group: Path
    """The folder that seeds lie in, or the run's own."""
    comparison: Comparison
    logs: dict[str, Log]
    """By row; the initial model has none."""
    trained_as: str
    """Equal for runs whose training differs in the seeds only."""
    measured_as: str
    """Equal for runs whose models were asked the same and compared with the same."""
    seeds: str
    """The seeds of its stages."""

    @property
    def measured(self) -> bool:
        """Whether its models were measured here: of another program's there is only a log."""
        return self.comparison.kl_to is not None


def read_runs(paths: Sequence[Path]) -> list[list[Run]]:
    """The runs at `paths`, seeds of each other together, in the order they are given.

    A path is a run folder, a folder with seed-*/ run folders, or an output folder of transformers or TRL (seed-*/ too).
    Raises UserError for a path that is none of these, and for a run that has not been compared yet.
    """
    groups: dict[str, list[Run]] = {}
    seen: set[Path] = set()
    for path in paths:
        for run in read_run(path):
            if run.path.resolve() in seen:
                raise UserError(f"{run.path} was given twice")
            seen.add(run.path.resolve())
            groups.setdefault(run.trained_as + run.measured_as, []).append(run)
    # Two runs of the same seed are the same training twice, and no seeds of each other.
    return [
        part
        for runs in groups.values()
        for part in ([runs] if len({run.seeds for run in runs}) == len(runs) else [[run] for run in runs])
    ]


def read_run(path: Path) -> list[Run]:
    """One run, or all seeds of one. Raises as `read_runs` does."""
    if (path / REPORT).is_file() and not seed_folders(path):
        return [_ours(path, path)]
    if found := [_ours(seed, path) for seed in seed_folders(path) if (seed / REPORT).is_file()]:
        _refuse_unlike(path, found)
        missing = [seed.name for seed in seed_folders(path) if not (seed / REPORT).is_file()]
        left_out = [f"{path}: {', '.join(missing)} is not finished, and is left out."] if missing else []
        return [replace(run, comparison=run.comparison.model_copy(update={"notes": left_out})) for run in found]
    logs = read_logs(path)
    if (path.parent / REPORT).is_file() and (path / METRICS).is_file():
        raise UserError(f"{path} is a stage: compare its run, {path.parent}")
    if any(log.path.name != STATE for log in logs):
        raise UserError(
            f"{path} has no {REPORT}: the run is not finished, or has no data.eval; `aligndistil compare RECIPE` "
            "finishes it"
        )
    return [_theirs(log) for log in logs]


def _refuse_unlike(path: Path, seeds: Sequence[Run]) -> None:
    if len({run.trained_as for run in seeds}) > 1:
        raise UserError(f"{path}: its seeds were trained from different recipes; give the folders that belong together")
    if len({run.measured_as for run in seeds}) > 1:
        raise UserError(
            f"{path}: its seeds were not measured on the same prompts and pairs with the same settings; "
            "`aligndistil compare RECIPE --seeds N` measures them again"
        )


def is_run(path: Path) -> bool:
    """Whether `path` is a run of ours that has been compared, or holds seeds of one."""
    return any((folder / REPORT).is_file() for folder in (path, *seed_folders(path)))


def _ours(path: Path, group: Path) -> Run:
    comparison, run = load_results(path / REPORT), RunFolder(path)
    stages = {row.name: run.stage(row.name) for row in comparison.results if row.objective}
    logs = {name: read_logs(stage.path)[0] for name, stage in stages.items() if (stage.path / METRICS).is_file()}
    done = {name: found for name, stage in stages.items() if (found := stage.read_done()) is not None}
    trained_as = json.dumps({name: _without_seed(one) for name, one in done.items()}, sort_keys=True)
    seeds = json.dumps({name: one.resolved["train"]["seed"] for name, one in done.items()}, sort_keys=True)
    seed = min((one.resolved["train"]["seed"] for one in done.values()), default=0)  # of every row of the run
    for name, one in done.items():
        if comparison.weights.get(name, one.weights) != one.weights:
            raise UserError(
                f"{path}: {name} was trained again after the models were measured; `aligndistil compare RECIPE` "
                "measures them again"
            )
    measured_as = json.dumps([comparison.measured_on, str(comparison.kl_to), str(comparison.reward)])
    rows = []
    for row in comparison.results:
        # The threshold of one run alone is another than that of all.
        metrics = {name: value for name, value in row.metrics.items() if name != STEPS}
        row = row.model_copy(update={"metrics": metrics, "measured_on": comparison.measured_on})
        rows.append(row.model_copy(update={"values": _values(path, comparison, row), "train_seeds": [seed]}))
    comparison = comparison.model_copy(update={"results": rows, "notes": []})
    return Run(path, group, comparison, logs, trained_as, measured_as, seeds)


def _values(path: Path, comparison: Comparison, row: ModelResult) -> dict[str, list[list[float]]]:
    """What the metrics of a row are means of, prompt by prompt or pair by pair; nothing where it is not of them."""
    models = path / "report" / "models"
    measured = [read_measured(models / f"{row.name}{ending}.json") for ending in ("", ".judged")]
    own = next((reward.shares("eval") for reward in comparison.rewards if reward.of == row.name), [])
    values = {metric: [of] for one in measured if one is not None for metric, of in one.values.items()}
    values |= {ACCURACY: own} if own else {}
    # An interrupted measurement leaves files that are newer than the comparison.
    return {
        metric: rows
        for metric, rows in values.items()
        if rows[0] and math.isclose(sum(rows[0]) / len(rows[0]), row.metrics.get(metric, math.nan), abs_tol=1e-9)
    }


def _without_seed(done: Done) -> dict[str, Any]:
    kept = {name: value for name, value in done.resolved.items() if name not in LOOKED_AT}
    return kept | {"train": {name: value for name, value in kept["train"].items() if name != "seed"}}


def _theirs(log: Log) -> Run:
    """The last logged value of everything, under our name where we have one; `eval/...` is of an evaluation."""
    last = {split: _last(log, split) for split in ("train", "eval")}
    metrics = last["train"] | {f"eval/{name}": value for name, value in last["eval"].items()}
    # Ours is of held-out pairs, and our KL is exact, of samples for held-out prompts: its own are others.
    metrics = {name: value for name, value in metrics.items() if name not in (ACCURACY, "kl")}
    if ACCURACY in last["eval"]:
        metrics[ACCURACY] = last["eval"][ACCURACY]
    if log.lines:
        metrics["steps"] = max(line["step"] for line in log.lines)
    metrics |= _summary(log.path)
    row = ModelResult(name=log.run, objective="", metrics=metrics)
    group = log.group if log.seed else log.path.parent
    theirs = Comparison(results=[row])
    return Run(log.path.parent, group, theirs, {log.run: log}, str(log.group), "", log.seed)


def _last(log: Log, split: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in log.lines:
        if line["split"] == split:
            values |= {name: value for name, value in line.items() if name not in ("step", "split")}
    return values


def _summary(state: Path) -> dict[str, float]:
    """The entry that transformers ends a training with; an evaluation may follow."""
    names = {"train_runtime": "seconds", "train_tokens_per_second": "tokens_per_second"}
    history: list[Mapping[str, Any]] = json.loads(state.read_bytes())["log_history"]
    ends = [entry for entry in history if "train_runtime" in entry]
    found = {ours: ends[-1].get(theirs) for theirs, ours in names.items()} if ends else {}
    # transformers writes -1 for a speed that it has not counted.
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and value >= 0}
