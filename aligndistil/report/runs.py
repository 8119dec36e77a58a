"""Existing runs, ours and transformers', as comparisons that can be put together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligndistil.errors import UserError
from aligndistil.report.logs import BOOKKEEPING, EVAL, METRICS, STATE, Log, read_logs, seed_folders
from aligndistil.report.results import STEPS, Comparison, ModelResult, load_results, read_measured
from aligndistil.run_folder import RunFolder

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
    parts: list[list[Run]] = []
    for runs in groups.values():
        # Two runs of the same seed are the same training twice, and no seeds of each other.
        parts += [runs] if len({run.seeds for run in runs}) == len(runs) else [[run] for run in runs]
    return parts


def read_run(path: Path) -> list[Run]:
    """One run, or all seeds of one. Raises as `read_runs` does."""
    if (path / REPORT).is_file() and not seed_folders(path):
        return [_ours(path, path)]
    if found := [_ours(seed, path) for seed in seed_folders(path) if (seed / REPORT).is_file()]:
        if len({run.trained_as for run in found}) > 1:
            raise UserError(
                f"{path}: its seeds were trained from different recipes; give the folders that belong together"
            )
        if len({run.measured_as for run in found}) > 1:
            raise UserError(
                f"{path}: its seeds were not measured on the same prompts and pairs with the same settings; "
                "`aligndistil compare RECIPE --seeds N` measures them again"
            )
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


def is_run(path: Path) -> bool:
    """Whether `path` is a run of ours that has been compared, or holds seeds of one."""
    return any((folder / REPORT).is_file() for folder in (path, *seed_folders(path)))


def _ours(path: Path, group: Path) -> Run:
    comparison, run = load_results(path / REPORT), RunFolder(path)
    stages = {row.name: run.stage(row.name) for row in comparison.results if row.objective}
    logs = {name: read_logs(stage.path)[0] for name, stage in stages.items() if (stage.path / METRICS).is_file()}
    done = {name: found for name, stage in stages.items() if (found := stage.read_done()) is not None}
    seeds = {name: one.resolved["train"]["seed"] for name, one in done.items()}
    trained = {
        name: {section: value for section, value in one.resolved.items() if section not in LOOKED_AT}
        | {"train": one.resolved["train"] | {"seed": None}}
        for name, one in done.items()
    }
    for name, one in done.items():
        if comparison.weights.get(name, one.weights) != one.weights:
            raise UserError(
                f"{path}: {name} was trained again after the models were measured; `aligndistil compare RECIPE` "
                "measures them again"
            )
    measured_as = json.dumps([comparison.measured_on, str(comparison.kl_to), str(comparison.reward)])
    rows = [
        row.model_copy(
            update={
                # The threshold of one run alone is another than that of all.
                "metrics": {name: value for name, value in row.metrics.items() if name != STEPS},
                "measured_on": comparison.measured_on,
                "values": _values(path, comparison, row),
                "train_seeds": [min(seeds.values(), default=0)],
            }
        )
        for row in comparison.results
    ]
    comparison = comparison.model_copy(update={"results": rows, "notes": []})
    trained_as, seeds_of = (json.dumps(told, sort_keys=True) for told in (trained, seeds))
    return Run(path, group, comparison, logs, trained_as, measured_as, seeds_of)


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


def _theirs(log: Log) -> Run:
    """The last logged value of everything, under our name where we have one; `eval/...` is of an evaluation."""
    metrics: dict[str, float] = {}
    for line in sorted(log.lines, key=lambda line: bool(line["split"] == "eval")):
        prefix = EVAL if line["split"] == "eval" else ""
        metrics |= {prefix + name: value for name, value in line.items() if name not in BOOKKEEPING}
    # Ours is of held-out pairs, and our KL is exact, of samples for held-out prompts: its own are others.
    metrics = {name: value for name, value in metrics.items() if name not in (ACCURACY, "kl")}
    if EVAL + ACCURACY in metrics:
        metrics[ACCURACY] = metrics[EVAL + ACCURACY]
    if log.lines:
        metrics["steps"] = max(line["step"] for line in log.lines)
    row = ModelResult(name=log.run, objective="", metrics=metrics | _summary(log.path))
    group = log.group if log.seed else log.path.parent
    return Run(log.path.parent, group, Comparison(results=[row]), {log.run: log}, str(log.group), "", log.seed)


def _summary(state: Path) -> dict[str, float]:
    """The entry that transformers ends a training with; an evaluation may follow."""
    names = {"train_runtime": "seconds", "train_tokens_per_second": "tokens_per_second"}
    history: list[Mapping[str, Any]] = json.loads(state.read_bytes())["log_history"]
    ends = [entry for entry in history if "train_runtime" in entry]
    found = {ours: ends[-1].get(theirs) for theirs, ours in names.items()} if ends else {}
    # transformers writes -1 for a speed that it has not counted.
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and value >= 0}
