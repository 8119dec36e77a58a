"""Several runs as one comparison: seeds averaged, what is better beyond chance, names that tell rows apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd

from aligndistil.report.curves import Logs, steps_to_reward
from aligndistil.report.logs import Log
from aligndistil.report.results import INITIAL, STEPS, ComparedWith, Comparison, Difference, ModelResult, RewardResult
from aligndistil.report.runs import Run
from aligndistil.report.statistics import LEVEL, difference, estimate, holm, interval_of_share
from aligndistil.report.tables import COLUMNS, SHARES

_T = TypeVar("_T")


def combine(groups: Sequence[Sequence[Run]]) -> tuple[Comparison, Logs]:
    """One table of all runs, and the logs of its rows by seed. Runs of one group are seeds of each other."""
    # Two runs of one folder that are no seeds of each other are called by their own folders.
    folders = [runs[0].group for runs in groups]
    names = _names([runs[0].path if folders.count(runs[0].group) > 1 else runs[0].group for runs in groups])
    models: dict[str, dict[str, ModelResult]] = {}
    logs: dict[str, dict[str, Log]] = {}
    rewards: list[RewardResult] = []
    foreign: list[str] = []
    for name, group in zip(names, groups, strict=True):
        prefix = f"{name}/" if len(groups) > 1 else ""
        runs = sorted(group, key=lambda run: run.comparison.results[0].train_seeds)
        seeds = dict(zip(_names([run.path for run in runs]), runs, strict=True))
        tables = {seed: {row.name: row for row in run.comparison.results} for seed, run in seeds.items()}
        for first in runs[0].comparison.results:
            if not all(first.name in table for table in tables.values()):
                continue  # a mean of some seeds is of other seeds
            full = f"{prefix}{first.name}"
            if not runs[0].measured:
                full = name if prefix else first.name
                foreign.append(full)
            method = f"{first.method} ({name})" if prefix and first.method else first.method
            called = {"name": full, "method": method}
            models[full] = {seed: table[first.name].model_copy(update=called) for seed, table in tables.items()}
            logs[full] = {seed: run.logs[first.name] for seed, run in seeds.items() if first.name in run.logs}
        rewards += _averaged_rewards(runs, prefix)
    runs = [run for group in groups for run in group]
    measured = [run.comparison for run in runs if run.measured]
    metric = _only([comparison.threshold_metric for comparison in measured])
    value = _only([comparison.threshold_value for comparison in measured]) if metric else None
    threshold, steps = steps_to_reward(logs, metric, value)
    kl_to, reward = _compared_with(groups, "kl_to"), _compared_with(groups, "reward")
    notes = _notes(runs, foreign, [kl_to, reward])
    if metric and threshold is None:
        notes.append(f"No steps to a reward: no two stages have a curve of {metric} that rises.")
    combined = Comparison(
        results=_one_initial([summarise(seeds, steps.get(name, {})) for name, seeds in models.items()]),
        kl_to=kl_to,
        reward=reward,
        against=_compared_with(groups, "against"),
        rewards=rewards,
        show_rewards=any(comparison.show_rewards for comparison in measured),
        columns=_only([run.comparison.columns for run in runs]),
        measured_on=_only([run.comparison.measured_on for run in runs]) or "",
        judged=list(dict.fromkeys(note for run in runs for note in run.comparison.judged)),
        notes=notes,
        threshold=threshold,
        threshold_metric=metric,
        threshold_value=value,
        weights=runs[0].comparison.weights if len(runs) == 1 else {},
    )
    return _with_differences(combined), logs


def with_statistics(comparison: Comparison) -> Comparison:
    """A comparison of one seed with errors, intervals and differences, from what its rows measured of each prompt."""
    rows = [summarise({"": row}) for row in comparison.results]
    return _with_differences(comparison.model_copy(update={"results": rows}))


def summarise(seeds: Mapping[str, ModelResult], steps: Mapping[str, float] | None = None) -> ModelResult:
    """The same model of one or several seeds, by their names, and the steps that they took to the reward.

    Of the metrics that every seed has: means over seeds, with standard errors and intervals where they are known.
    """
    results = list(seeds.values())
    reached = {seed: {STEPS: step} for seed, step in (steps or {}).items()}
    per_seed = {seed: result.metrics | reached.get(seed, {}) for seed, result in seeds.items()}
    table = pd.DataFrame(per_seed, dtype=float).dropna()
    samples = {name: [[value] for value in of_seeds] for name, of_seeds in zip(table.index, table.values, strict=True)}
    shares = set()
    for name in samples:
        rows = [row for result in results for row in result.values.get(name, [])]
        if len(rows) == len(results) and len(set(map(len, rows))) == 1:
            samples[name] = rows
            shares |= {name} & set(SHARES)
    found = {name: one for name, sample in samples.items() if (one := estimate(sample)).error is not None}
    several = len(results) > 1
    changes = {
        "metrics": table.mean(axis="columns").to_dict(),
        "errors": {name: one.error for name, one in found.items()},
        "intervals": {
            name: interval_of_share(samples[name]) if name in shares else one.interval for name, one in found.items()
        },
        "spread": table.std(axis="columns").to_dict() if several else {},
        "per_seed": per_seed if several else {},
        "train_seeds": [seed for result in results for seed in result.train_seeds],
        "values": samples,
    }
    return results[0].model_copy(update=changes)


def _with_differences(comparison: Comparison) -> Comparison:
    """How far each row is from the best of a column, and which is better than all others beyond chance.

    Of the rows that were asked the same prompts and trained with the same seeds: most of them, where not all were.
    Nothing of scores by reward models that are not the same.
    """
    kinds = {row.name: (row.measured_on, tuple(row.train_seeds)) for row in comparison.results if row.measured_on}
    if not kinds:
        return comparison
    ((usual, _),) = Counter(kinds.values()).most_common(1)
    alike = [row for row in comparison.results if kinds.get(row.name) == usual]
    found: list[Difference] = []
    best: dict[str, str] = {}
    unlike = {"reward_score"} if comparison.reward and not comparison.reward.same_in_all_runs else set()
    for metric, better in ((column.metric, column.better) for column in COLUMNS):
        rows = [row for row in alike if metric in row.metrics]
        if better is None or len(rows) < 2 or metric in unlike:
            continue
        first = (max if better == "higher" else min)(rows, key=lambda row: row.metrics[metric])
        samples = {row.name: np.array(row.values[metric]) for row in rows}
        own = samples.pop(first.name)
        if own.size < 2 or any(values.shape != own.shape for values in samples.values()):
            continue  # nothing is paired with anything
        ps = []
        for name, values in samples.items():
            one, p = difference(values, own)
            low, high = one.interval
            found.append(Difference(metric=metric, name=name, best=first.name, mean=one.mean, low=low, high=high))
            ps.append(1.0 if p is None else p)  # a single seed is no test
        # Corrected for the number of rows, the best itself among them: it was chosen by the same numbers.
        if max(holm([*ps, 1.0])[:-1]) <= LEVEL:
            best[metric] = first.name
    notes = list(comparison.notes)
    rows = [row for row in comparison.results if row.measured_on == usual[0]]
    seeds_differ = [row.label for row in rows if kinds[row.name] != usual]
    if found and seeds_differ:
        notes.append(f"Not compared with the others, since its seeds are others: {', '.join(seeds_differ)}.")
    return comparison.model_copy(update={"differences": found, "best": best, "notes": notes})


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
    if len(initial) < 2 or any((row.metrics, row.spread) != (initial[0].metrics, initial[0].spread) for row in initial):
        return list(rows)
    method = initial[0].method.partition(" (")[0]
    first = initial[0].model_copy(update={"name": INITIAL, "method": method})
    return [first, *(row for row in rows if row not in initial)]


def _compared_with(groups: Sequence[Sequence[Run]], of: Literal["kl_to", "reward", "against"]) -> ComparedWith | None:
    """The model that the runs which have one are measured with."""
    having = [[run.comparison for run in runs] for runs in groups if getattr(runs[0].comparison, of) is not None]
    names = {str(getattr(comparison, of)) for comparisons in having for comparison in comparisons}
    if len(names) != 1:
        return ComparedWith(name="model", same_in_all_runs=False) if names else None
    (name,) = names
    models = {frozenset(comparison.weights.get(name) for comparison in comparisons) for comparisons in having}
    return ComparedWith(name=name, same_in_all_runs=len(models) == 1)


def _notes(runs: Sequence[Run], foreign: Sequence[str], with_: Sequence[ComparedWith | None]) -> list[str]:
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
    if foreign:
        notes.append(f"{', '.join(foreign)}: the last values that its own trainer logged, on its own data.")
    return list(dict.fromkeys(notes))


def _only(values: Sequence[_T]) -> _T | None:
    """What all values are."""
    return values[0] if values and all(value == values[0] for value in values) else None
