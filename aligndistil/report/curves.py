"""Curves from training logs: one metric over steps, tokens, seconds or another metric, and when they reach a value."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndistil.errors import UserError, guess_and_list
from aligndistil.report.logs import (
    BOOKKEEPING,
    EVAL,
    Log,
    off_policy,
    read_logs,
    split_and_name,
    step_seconds,
    values_of,
)
from aligndistil.report.results import Threshold

Array = NDArray[np.float64]

UNITS = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}
"""What x counts; any other x is a metric."""
WINDOWS = 12
"""By default a line averages over a twelfth of the usual curve, and a curve of fewer than 24 points is as it is."""
SHARE = 0.9
"""Of the way from its start to its end: where each curve's own threshold lies."""
LONG = 0.5
"""A curve of fewer steps than this share of the longest has just begun."""
REWARDS = ("reward/token_mean", "gold_reward", "eval/gold_reward")
"""What steps are counted on: the first of these that two models have."""


# ---- methods and their curves


@dataclass(frozen=True, slots=True)
class Method:
    """One curve's logs: the same training with one or several seeds."""

    names: tuple[str, ...]
    """What it can be called, from short to unmistakable; notes on the terminal have the third."""
    logs: tuple[Log, ...]
    asked: str
    """The argument it came from."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """S seeds at P points."""

    label: str
    steps: Array
    """(P,) optimizer steps, those that every seed has."""
    x: Array
    """(S, P)"""
    values: Array
    """(S, P)"""

    @property
    def seeds(self) -> int:
        return len(self.values)

    @property
    def mean_x(self) -> Array:
        return np.asarray(self.x.mean(axis=0))

    @property
    def mean(self) -> Array:
        return np.asarray(self.values.mean(axis=0))

    @property
    def error(self) -> Array | None:
        """(P,) standard error of the mean over seeds; None of one seed."""
        return self.values.std(axis=0, ddof=1) / np.sqrt(self.seeds) if self.seeds > 1 else None

    def smoothed(self, reach: float, *, x_too: bool = False) -> Curve:
        """Each seed's moving average over the points within `reach` steps on either side."""
        values = moving_average(self.steps, self.values, reach)
        return replace(self, values=values, x=moving_average(self.steps, self.x, reach) if x_too else self.x)


class Found(NamedTuple):
    """The curves that could be made, and a sentence for each that could not."""

    curves: list[Curve]
    notes: list[str]


def read_methods(runs: Sequence[str | Path]) -> list[Method]:
    """The logs of `runs`, seeds of the same stage together. `LABEL=RUN` gives the name.

    Raises UserError for a log that two of `runs` hold, and as `read_logs` does.
    """
    grouped: dict[tuple[str, Path, str], tuple[str, dict[Path, Log]]] = {}
    read_before: set[Path] = set()
    for run in map(str, runs):
        label, equals, after = run.partition("=")
        label, path = (label, Path(after)) if equals and not Path(run).exists() else ("", Path(run))
        logs = {log.path.resolve(): log for log in read_logs(path)}
        for place, log in logs.items():
            if place in read_before:
                raise UserError(f"{log.path.parent} was given twice")
            grouped.setdefault((label, log.group, log.stage), (run, {}))[1][place] = log
        read_before |= logs.keys()
    if not grouped:
        raise UserError("give at least one run: a run folder, a stage folder, a metrics.jsonl or TRL's output folder")
    same_stage = len({stage for _, _, stage in grouped}) == 1
    return [
        Method(_names(label, next(iter(logs.values())), same_stage), tuple(logs.values()), run)
        for (label, _, _), (run, logs) in grouped.items()
    ]


def _names(label: str, log: Log, same_stage: bool) -> tuple[str, ...]:
    """Without a label the stage, or the run where all are the same stage; run/stage; and one folder more each time.

    None of them is of a seed: `log` is that of one of several.
    """
    stage = log.stage or log.run
    if label:
        return (label, f"{label}/{stage}", f"{label}/{stage}", f"{label}/{stage} ({log.group})")
    folders = [*log.group.parts[:-1], log.run, *([log.stage] if log.stage else [])]
    full = "/".join(folders[-2:]) if log.stage else log.run
    return (stage, log.run if same_stage else full, full, *("/".join(folders[-n:]) for n in range(3, len(folders) + 1)))


def _labels(methods: Sequence[Method]) -> list[str]:
    """The shortest name of each that no other has."""
    names = [list(method.names) for method in methods]
    while True:
        often = Counter(candidates[0] for candidates in names)
        taken = [candidates for candidates in names if often[candidates[0]] > 1 and len(candidates) > 1]
        if not taken:
            return [candidates[0] for candidates in names]
        for candidates in taken:
            del candidates[0]


def curves_of(methods: Sequence[Method], metric: str, x: str = "step") -> Found:
    """A curve for each method that has `metric`.

    `x` is step, tokens (trained on so far), seconds (of training so far, rollouts included, evaluations not), or
    another metric at the same step. A reward of given responses is left out: it does not depend on the policy.
    Raises UserError when no method gives a curve.
    """
    found = [(method, *_curve(method.names[2], method.logs, metric, x)) for method in methods]
    drawn = [(method, curve) for method, curve, _ in found if curve is not None]
    if not drawn:
        raise UserError(_why_none(methods, metric, x))
    told_of = {method.asked for method, curve, why in found if curve is not None or why}
    silent = (run for run in dict.fromkeys(method.asked for method in methods) if run not in told_of)
    notes = [note for _, _, why in found for note in why]
    notes += [f"{run} has no `{metric}`: it is left out" for run in silent]
    curves = []
    for (method, curve), label in zip(drawn, _labels([method for method, _ in drawn]), strict=True):
        given = split_and_name(metric)[0] == "train" and off_policy(method.logs[0].lines)
        mark = " (off-policy)" if given and metric.startswith(("kl/", "reward/")) else ""
        curves.append(replace(curve, label=label + mark))
    return Found(curves, notes)


def _curve(name: str, logs: Sequence[Log], metric: str, x: str) -> tuple[Curve | None, list[str]]:
    found = [(log, _points(log, metric, x)) for log in logs]
    usable = [points for _, points in found if points]
    if not usable:
        split, own = split_and_name(metric)
        if any(values_of(log.lines, metric) for log in logs):
            return None, [f"{name}: its log does not say the `{x}` of its `{metric}`: left out"]
        if any(line["split"] == split and own in line for log in logs for line in log.lines):
            return None, [f"{name}: its `{metric}` is of given responses and does not depend on the policy: left out"]
        return None, []
    notes = [f"{name}: {log.seed or log.path} has no `{metric}` yet and is left out" for log, p in found if not p]
    shared = sorted(set.intersection(*map(set, usable)))
    longest = max(map(max, usable))
    if not shared:
        return None, [*notes, f"{name}: its seeds have no step in common and are left out"]
    if shared[-1] < longest:
        notes.append(f"{name} ends at step {shared[-1]:g}, where its shortest seed does (the longest: {longest:g})")
    pairs = np.array([[points[step] for step in shared] for points in usable])
    return Curve(name, np.array(shared), pairs[:, :, 0], pairs[:, :, 1]), notes


def _points(log: Log, metric: str, x: str) -> dict[float, tuple[float, float]]:
    """(x, value) by step."""
    values = values_of(log.lines, metric)
    if x == "step":
        at = {step: step for step in values}
    elif x in UNITS:
        known = values_of(log.lines, "num_tokens") if x == "tokens" else step_seconds(log.lines)
        amounts = np.interp(list(values), [0.0, *known], [0.0, *known.values()]).tolist() if known else []
        at = dict(zip(values, amounts, strict=False))
    else:
        at = values_of(log.lines, x)
    return {step: (at[step], value) for step, value in values.items() if step in at}


def _why_none(methods: Sequence[Method], metric: str, x: str) -> str:
    lines = [line for method in methods for log in method.logs for line in log.lines]
    there = {(EVAL if line["split"] == "eval" else "") + name for line in lines for name in line.keys() - BOOKKEEPING}
    runs = ", ".join(dict.fromkeys(method.asked for method in methods))
    if not there:
        return f"{runs}: nothing has been logged yet"
    for asked, option in ((metric, "--metric"), (x, "--x")):
        known = sorted(there) if option == "--metric" else [*UNITS, *sorted(there)]
        if asked.removeprefix("train/") not in known:
            nearest_first = sorted(known, key=lambda name: -SequenceMatcher(None, asked, name).ratio())
            return f"{option}: no stage of {runs} has `{asked}`{guess_and_list(asked, nearest_first, 'metrics')}"
        if asked not in UNITS and not any(values_of(log.lines, asked) for method in methods for log in method.logs):
            return (
                f"{option}: `{asked}` is here only of given responses, and does not depend on the policy there: "
                "it is a curve of stages that sample"
            )
    if x in ("tokens", "seconds"):
        return f"--x {x}: the logs do not say how many {UNITS[x]} a step took; `--x step` needs nothing more"
    return f"`{metric}` and `{x}` were never logged at the same step"


# ---- smoothing


def default_reach(curves: Sequence[Curve], windows: int = WINDOWS) -> list[float]:
    """For each curve, the steps on either side that its moving average takes in.

    Half a twelfth of the steps of the curve of middle length (the shorter of two), no wider than fits into a curve's
    own steps and no narrower than to its next point. 0 for a curve of few points, which has no say in the others'.
    """
    long = [len(curve.steps) >= 2 * windows for curve in curves]
    own = [float(np.ptp(curve.steps) // (2 * windows)) for curve in curves]
    usual = statistics.median_low(list(compress(own, long)) or [0.0])
    reaches = []
    for curve, is_long, steps in zip(curves, long, own, strict=True):
        apart = np.diff(curve.steps)
        reach = max(min(usual, steps), float(np.median(apart))) if is_long and usual else 0.0
        reaches.append(reach if (apart <= reach).any() else 0.0)
    return reaches


def smoothed(curves: Sequence[Curve]) -> list[Curve]:
    """All of them, as far as `default_reach` says."""
    return [curve.smoothed(reach) for curve, reach in zip(curves, default_reach(curves), strict=True)]


def moving_average(at: Array, values: Array, reach: float) -> Array:
    """Centred mean over the points within `reach` of each, `at` ascending (P,), values (..., P)."""
    first = np.searchsorted(at, at - reach, side="left")
    after = np.searchsorted(at, at + reach, side="right")
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    averaged: Array = (sums[..., after] - sums[..., first]) / (after - first)
    return np.where(after - first == 1, values, averaged)  # one point is itself, without rounding


# ---- thresholds


@dataclass(frozen=True, slots=True)
class Reached:
    """Where one curve first reaches the threshold, in units of x."""

    label: str
    x: float | None
    """Of the mean line; None when it never does."""
    seeds: tuple[float | None, ...]
    """Of each seed alone."""
    from_the_start: bool
    """Whether its first point is there already, so that it says nothing of speed."""
    last_x: float
    ratio: float | None = None
    """x divided by that of the fastest curve; None where either is not known."""


class Crossing(NamedTuple):
    """A value to reach, how it was chosen, and what each curve needs to it."""

    value: float
    chosen: str
    reached: list[Reached]
    """In the order of the curves."""

    @property
    def fastest_first(self) -> list[Reached]:
        return sorted(self.reached, key=lambda one: (one.x is None, one.x or 0.0))


def steps_to(curves: Sequence[Curve], value: float | None = None) -> Crossing | None:
    """The x that each curve, taken as it is (smooth it before), needs to `value`, and the ratios to the fastest.

    The value is approached from the side of the curves' starts; where it lies among them, in the direction that the
    curves go. Without one, each curve that rises has its own at 90 % of the way from its start to its end, and the
    lowest of these is taken, which all of them reach; a run that has just begun does not lower it. None when no curve
    rises.
    """
    ends = [(float(curve.mean[0]), float(curve.mean[-1])) for curve in curves]
    starts = [first for first, _ in ends]
    if value is None:
        long = max(curve.steps[-1] for curve in curves) * LONG
        risen = [
            first + SHARE * (last - first)
            for curve, (first, last) in zip(curves, ends, strict=True)
            if last > first and curve.steps[-1] >= long
        ]
        if not risen:
            return None
        value, rising = min(risen), True
        chosen = f"{100 * SHARE:.0f} % of the way from start to end of the curve that gets least far"
    else:
        among = min(starts) <= value <= max(starts)
        rising = sum(last - first for first, last in ends) >= 0 if among else value > max(starts)
        chosen = "as asked"
    reached = [_reached(curve, value, rising) for curve in curves]
    fastest = min((one.x for one in reached if one.x is not None), default=0.0)
    if fastest > 0 and not any(one.from_the_start for one in reached):
        reached = [one if one.x is None else replace(one, ratio=one.x / fastest) for one in reached]
    return Crossing(value, chosen, reached)


def _reached(curve: Curve, value: float, rising: bool) -> Reached:
    def first(x: Array, values: Array) -> float | None:
        there = x[values >= value if rising else values <= value]
        return float(there[0]) if len(there) else None

    return Reached(
        label=curve.label,
        x=first(curve.mean_x, curve.mean),
        seeds=tuple(map(first, curve.x, curve.values)),
        from_the_start=bool(curve.mean[0] >= value if rising else curve.mean[0] <= value),
        last_x=float(curve.mean_x[-1]),
    )


# ---- of a comparison


Logs = Mapping[str, Mapping[str, Log]]
"""By row, then by seed; the seed of a single run is its only one."""


def curves_by_row(logs: Logs, metric: str, x: str = "step") -> dict[str, Curve]:
    """The curves of the rows that have the metric in every seed."""
    found = {row: _curve(row, list(seeds.values()), metric, x)[0] for row, seeds in logs.items()}
    return {row: curve for row, curve in found.items() if curve is not None and curve.seeds == len(logs[row])}


def steps_to_reward(
    logs: Logs, metric: str | None, value: float | None
) -> tuple[Threshold | None, dict[str, dict[str, float]]]:
    """The threshold that steps are counted to, and by row and seed the steps; a row that begins there has none.

    Curves are moving averages. Without `metric`, the first of REWARDS that gives a threshold is taken; without `value`,
    `steps_to` chooses it, which takes two curves.
    """
    for candidate in (metric,) if metric else REWARDS:
        curves = curves_by_row(logs, candidate)
        found = steps_to(smoothed(list(curves.values())), value) if len(curves) >= (2 if value is None else 1) else None
        if found is not None:
            steps = {
                row: {seed: x for seed, x in zip(logs[row], reached.seeds, strict=True) if x is not None}
                for row, reached in zip(curves, found.reached, strict=True)
                if not reached.from_the_start
            }
            return Threshold(metric=candidate, value=found.value, chosen=found.chosen), steps
    return None, {}
