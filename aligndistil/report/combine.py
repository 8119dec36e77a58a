"""Several runs as one comparison: seeds averaged, what is better beyond chance, names that tell rows apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from aligndistil.report.curves import steps_to_reward
from aligndistil.report.logs import Log
from aligndistil.report.results import INITIAL, ComparedWith, Comparison, Difference, ModelResult, RewardResult
from aligndistil.report.runs import Run
from aligndistil.report.statistics import LEVEL, difference, estimate, holm, interval_of_share
from aligndistil.report.tables import COLUMNS, SHARES

_T = TypeVar("_T")


def combine(groups: Sequence[Sequence[Run]]) -> tuple[Comparison, dict[str, dict[str, Log]]]:
    """One table of all runs, and the logs of its rows by seed. Runs of one group are seeds of each other."""
    # Two runs of one folder that are no seeds of each other are called by their own folders.
    folders = [runs[0].group for runs in groups]
    own = [runs[0].path if folders.count(runs[0].group) > 1 else runs[0].group for runs in groups]
    names = _names(own)
    rows: list[ModelResult] = []
    rewards: list[RewardResult] = []
    logs: dict[str, dict[str, Log]] = {}
    for name, runs in zip(names, groups, strict=True):
        prefix = f"{name}/" if len(groups) > 1 else ""
        runs = sorted(runs, key=lambda run: run.comparison.results[0].train_seeds)
        seeds = dict(zip(_names([run.path for run in runs]), runs, strict=True))
        tables = {seed: {row.name: row for row in run.comparison.results} for seed, run in seeds.items()}
        for first in runs[0].comparison.results:
            if not all(first.name in table for table in tables.values()):
                continue  # a mean of some seeds is of other seeds
            row = summarise({seed: table[first.name] for seed, table in tables.items()})
            full = name if prefix and not runs[0].measured else f"{prefix}{row.name}"
            method = f"{row.method} ({name})" if prefix and row.method else row.method
            rows.append(row.model_copy(update={"name": full, "method": method}))
            logs[full] = {seed: run.logs[row.name] for seed, run in seeds.items() if row.name in run.logs}
        rewards += _averaged_rewards(runs, prefix)
    runs = [run for group in groups for run in group]
    comparisons = [run.comparison for run in runs if run.measured]
    kl_to = _compared_with(groups, lambda comparison: comparison.kl_to)
    reward = _compared_with(groups, lambda comparison: comparison.reward)
    metric = _only([comparison.threshold_metric for comparison in comparisons], None)
    combined = Comparison(
        results=_one_initial(rows),
        kl_to=kl_to,
        reward=reward,
        against=_compared_with(groups, lambda comparison: comparison.against),
        rewards=rewards,
        show_rewards=any(comparison.show_rewards for comparison in comparisons),
        columns=_only([run.comparison.columns for run in runs], None),
        measured_on=_only([run.comparison.measured_on for run in runs], ""),
        judged=list(dict.fromkeys(note for run in runs for note in run.comparison.judged)),
        notes=_notes(groups, names, [kl_to, reward]),
        threshold_metric=metric,
        threshold_value=_only([comparison.threshold_value for comparison in comparisons], None) if metric else None,
        weights=runs[0].comparison.weights if len(runs) == 1 else {},
    )
    return with_statistics(steps_to_reward(combined, logs)), logs


def with_statistics(comparison: Comparison) -> Comparison:
    """The same with errors, intervals and differences, from what its rows measured of each prompt and seed."""
    rows = list(map(_with_errors, comparison.results))
    return _with_differences(comparison.model_copy(update={"results": rows}))


def summarise(seeds: Mapping[str, ModelResult]) -> ModelResult:
    """The same model of one or several seeds, by their names: means, over seeds, of the metrics that every seed has."""
    results = list(seeds.values())
    first = results[0]
    if len(results) == 1:
        return first
    shared = [name for name in first.metrics if all(name in result.metrics for result in results)]
    columns = {name: np.array([result.metrics[name] for result in results]) for name in shared}
    together = {
        name: [values for result in results for values in result.values[name]]
        for name in shared
        if all(name in result.values for result in results)
    }
    return first.model_copy(
        update={
            "metrics": {name: float(column.mean()) for name, column in columns.items()},
            "train_seeds": [seed for result in results for seed in result.train_seeds],
            "spread": {name: float(column.std(ddof=1)) for name, column in columns.items()},
            "per_seed": {
                seed: {name: result.metrics[name] for name in result.metrics} for seed, result in seeds.items()
            },
            "values": {name: rows for name, rows in together.items() if len(set(map(len, rows))) == 1},
        }
    )


def _with_errors(row: ModelResult) -> ModelResult:
    """Standard errors and intervals of all that is measured of prompts or pairs, or of several seeds."""
    errors, intervals = {}, {}
    for name in row.metrics:
        found = estimate(_sample(row, name))
        if found.error is not None:
            errors[name] = found.error
            intervals[name] = interval_of_share(row.values[name]) if _is_share(row, name) else found.interval
    return row.model_copy(update={"errors": errors, "intervals": intervals})


def _sample(row: ModelResult, metric: str) -> list[list[float]]:
    """(S, P) what a metric is the mean of; (S, 1) where it is one number of each seed."""
    if metric in row.values:
        return row.values[metric]
    return [[of_seed[metric]] for of_seed in row.per_seed.values() if metric in of_seed] or [[row.metrics[metric]]]


def _is_share(row: ModelResult, metric: str) -> bool:
    return metric in SHARES and metric in row.values


def _with_differences(comparison: Comparison) -> Comparison:
    """How far each row is from the best of a column, and which is better than all others beyond chance.

    Of the rows that were asked the same prompts and trained with the same seeds: most of them, where not all were.
    Nothing of scores by reward models that are not the same.
    """
    found: list[Difference] = []
    best: dict[str, str] = {}
    unlike = {"reward_score"} if comparison.reward and not comparison.reward.same_in_all_runs else set()
    alike = Counter((row.measured_on, tuple(row.train_seeds)) for row in comparison.results if row.measured_on)
    together = max(alike, key=lambda kind: alike[kind], default=None)
    apart = [row.label for row in comparison.results if (row.measured_on, tuple(row.train_seeds)) != together]
    for column in COLUMNS:
        metric = column.metric
        rows = [row for row in comparison.results if metric in row.metrics and row.label not in apart]
        if column.better is None or len(rows) < 2 or metric in unlike:
            continue
        first = (max if column.better == "higher" else min)(rows, key=lambda row: row.metrics[metric])
        samples = {row.name: np.array(_sample(row, metric)) for row in rows}
        own = samples.pop(first.name)
        if own.size < 2 or any(values.shape != own.shape for values in samples.values()):
            continue  # nothing is paired with anything
        paired = {name: difference(values, own) for name, values in samples.items()}
        for name, (one, _) in paired.items():
            low, high = one.interval
            found.append(Difference(metric=metric, name=name, best=first.name, mean=one.mean, low=low, high=high))
        ps = [p for _, p in paired.values() if p is not None]
        # Corrected for the number of rows, the best itself among them: it was chosen by the same numbers.
        if len(ps) == len(paired) and max(holm([*ps, 1.0])[:-1]) <= LEVEL:
            best[metric] = first.name
    seeds = [
        row.label for row in comparison.results if row.label in apart and together and row.measured_on == together[0]
    ]
    notes = [f"Not compared with the others, since its seeds are others: {', '.join(seeds)}."]
    return comparison.model_copy(
        update={"differences": found, "best": best, "notes": comparison.notes + (notes if found and seeds else [])}
    )


def _averaged_rewards(runs: Sequence[Run], prefix: str) -> list[RewardResult]:
    """The rewards that all seeds have, each with the pairs of all of them."""
    tables = [{reward.name: reward for reward in run.comparison.rewards} for run in runs]
    averaged = []
    for name, first in tables[0].items():
        splits = [s for s in first.right if all(name in table and s in table[name].right for table in tables)]
        if splits:
            right = {split: [marks for table in tables for marks in table[name].right[split]] for split in splits}
            full = " / ".join(prefix + part for part in name.split(" / "))
            averaged.append(first.model_copy(update={"name": full, "of": prefix + first.of, "right": right}))
    return averaged


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _one_initial(rows: Sequence[ModelResult]) -> list[ModelResult]:
    """Runs that began from the same model measured it alike: once is enough."""
    initial = [row for row in rows if row.name.endswith(f"/{INITIAL}")]
    if len(initial) < 2 or len(_different([(row.metrics, row.spread) for row in initial])) > 1:
        return list(rows)
    method = initial[0].method.partition(" (")[0]
    first = initial[0].model_copy(update={"name": INITIAL, "method": method})
    return [first, *(row for row in rows if row not in initial)]


def _compared_with(
    groups: Sequence[Sequence[Run]], of: Callable[[Comparison], ComparedWith | None]
) -> ComparedWith | None:
    """The model that the runs which have one are measured with."""
    having = [[run.comparison for run in runs] for runs in groups if of(runs[0].comparison) is not None]
    names = _different([str(of(comparison)) for comparisons in having for comparison in comparisons])
    if not names:
        return None
    if len(names) > 1:
        return ComparedWith(name="model", same_in_all_runs=False)
    models = _different([{comparison.weights.get(names[0]) for comparison in comparisons} for comparisons in having])
    return ComparedWith(name=names[0], same_in_all_runs=len(models) == 1)


def _notes(groups: Sequence[Sequence[Run]], names: Sequence[str], with_: Sequence[ComparedWith | None]) -> list[str]:
    runs = [run for group in groups for run in group]
    notes = [note for run in runs for note in run.comparison.notes]
    if len({run.comparison.measured_on for run in runs if run.measured}) > 1:
        notes.append(
            "The runs were not measured on the same prompts and pairs with the same settings: "
            "differences between their rows are not of the models alone."
        )
    notes += [
        f"What is measured with {model} cannot be compared between runs: it is another model in each."
        for model in with_
        if model is not None and not model.same_in_all_runs
    ]
    foreign = [(name, group) for name, group in zip(names, groups, strict=True) if not group[0].measured]
    if foreign:
        theirs = [name if len(groups) > 1 else group[0].comparison.results[0].name for name, group in foreign]
        notes.append(f"{', '.join(theirs)}: the last values that its own trainer logged, on its own data.")
    return list(dict.fromkeys(notes))


def _different(values: Sequence[_T]) -> list[_T]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _only(values: Sequence[_T], otherwise: _T) -> _T:
    """What all values are, or else `otherwise`."""
    return values[0] if len(_different(values)) == 1 else otherwise
