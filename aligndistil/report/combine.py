"""Several runs as one comparison: seeds averaged, rows of different runs under names that tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from aligndistil.report.aggregate import over_seeds, rewards_over_seeds
from aligndistil.report.logs import Log
from aligndistil.report.reaching import NO_STEPS, STEPS, with_steps_to_reward
from aligndistil.report.results import EACH_OWN, INITIAL, Comparison, ModelResult, RewardResult
from aligndistil.report.runs import Run

_T = TypeVar("_T")


def combine(groups: Sequence[Sequence[Run]]) -> tuple[Comparison, dict[str, dict[str, Log]]]:
    """One table of all runs, and the logs of its rows by seed. Runs of one group are seeds of each other."""
    names = _group_names([runs[0].group for runs in groups])
    rows: list[ModelResult] = []
    rewards: list[RewardResult] = []
    logs: dict[str, dict[str, Log]] = {}
    for name, runs in zip(names, groups, strict=True):
        prefix = f"{name}/" if len(groups) > 1 else ""
        for row in _averaged(runs):
            label = name if prefix and not _is_ours(runs[0]) else f"{prefix}{row.name}"
            rows.append(row.model_copy(update={"name": label}))
            logs[label] = {seed: run.logs[row.name] for seed, run in _by_seed(runs).items() if row.name in run.logs}
        rewards += [_prefixed(reward, prefix) for reward in _averaged_rewards(runs)]
    runs = [run for group in groups for run in group]
    kl_to = _compared_with(groups, lambda comparison: comparison.kl_to, "target")
    reward = _compared_with(groups, lambda comparison: comparison.reward, "reward model")
    combined = Comparison(
        kl_to=kl_to,
        results=_one_initial(rows),
        reward=reward,
        rewards=rewards,
        columns=_only([run.comparison.columns for run in runs], None),
        measured_on=_only([run.comparison.measured_on for run in runs], ""),
        notes=_notes(groups, names, [kl_to, reward]),
    )
    ours = [run.comparison for run in runs if _is_ours(run)]
    metric = _only([comparison.threshold_metric for comparison in ours], None)
    value = _only([comparison.threshold_value for comparison in ours], None) if metric else None
    return with_steps_to_reward(combined, logs, metric, value), logs


def _group_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _by_seed(runs: Sequence[Run]) -> dict[str, Run]:
    return dict(zip(_group_names([run.path for run in runs]), runs, strict=True))


def _averaged(runs: Sequence[Run]) -> list[ModelResult]:
    """The rows that all seeds have; those of a single run as they are."""
    tables = {
        seed: {row.name: _without_steps(row) for row in run.comparison.results} for seed, run in _by_seed(runs).items()
    }
    first = next(iter(tables.values()))
    if len(runs) == 1:
        return list(first.values())
    shared = [name for name in first if all(name in table for table in tables.values())]
    return [over_seeds({seed: table[name] for seed, table in tables.items()}) for name in shared]


def _without_steps(row: ModelResult) -> ModelResult:
    """The threshold of one run alone is another than that of all."""
    return row.model_copy(update={"metrics": {name: v for name, v in row.metrics.items() if name != STEPS}})


def _averaged_rewards(runs: Sequence[Run]) -> list[RewardResult]:
    tables = [{reward.name: reward for reward in run.comparison.rewards} for run in runs]
    return [
        rewards_over_seeds([table[name] for table in tables])
        for name in tables[0]
        if all(name in table for table in tables)
    ]


def _prefixed(reward: RewardResult, prefix: str) -> RewardResult:
    return reward.model_copy(update={"name": " / ".join(prefix + part for part in reward.name.split(" / "))})


def _one_initial(rows: Sequence[ModelResult]) -> list[ModelResult]:
    """Runs that began from the same model measured it alike: once is enough."""
    initial = [row for row in rows if row.name.endswith(f"/{INITIAL}")]
    if len(initial) < 2 or len(_different([(row.metrics, row.spread) for row in initial])) > 1:
        return list(rows)
    first = initial[0].model_copy(update={"name": initial[0].name.rpartition("/")[2]})
    return [first, *(row for row in rows if row not in initial)]


def _is_ours(run: Run) -> bool:
    return bool(run.comparison.kl_to)


def _compared_with(groups: Sequence[Sequence[Run]], of: Callable[[Comparison], str], what: str) -> str:
    """How the runs that have one call it; `EACH_OWN` says that it is not the same model in all of them."""
    having = [runs for runs in groups if of(runs[0].comparison)]
    names = _different([of(run.comparison) for runs in having for run in runs])
    if len(names) > 1:
        return f"{EACH_OWN} {what}"
    models = _different([{run.comparison.weights.get(names[0]) for run in runs} for runs in having])
    return f"{EACH_OWN} {names[0]}" if len(models) > 1 else "".join(names)


def _notes(groups: Sequence[Sequence[Run]], names: Sequence[str], compared_with: Sequence[str]) -> list[str]:
    runs = [run for group in groups for run in group]
    ours = [run for run in runs if _is_ours(run)]
    notes = [note for run in runs for note in run.comparison.notes if not note.startswith(NO_STEPS)]
    if len({run.comparison.measured_on for run in ours}) > 1:
        notes.append(
            "The runs were not measured on the same prompts and pairs with the same settings: "
            "differences between their rows are not of the models alone."
        )
    notes += [
        f"What is measured with {name} cannot be compared between runs: it is another model in each."
        for name in compared_with
        if name.startswith(EACH_OWN)
    ]
    foreign = [(name, group) for name, group in zip(names, groups, strict=True) if not _is_ours(group[0])]
    if foreign:
        theirs = ", ".join(_their_name(name, group, groups) for name, group in foreign)
        notes.append(f"{theirs}: the last values that its own trainer logged, on its own data.")
    return list(dict.fromkeys(notes))


def _their_name(name: str, group: Sequence[Run], groups: Sequence[Sequence[Run]]) -> str:
    return name if len(groups) > 1 else group[0].comparison.results[0].name


def _different(values: Sequence[_T]) -> list[_T]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _only(values: Sequence[_T], otherwise: _T) -> _T:
    """What all values are, or else `otherwise`."""
    return values[0] if len(_different(values)) == 1 else otherwise
