"""Curves from training logs: one metric over steps, tokens, seconds or another metric, a row for each seed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligndistil.errors import UserError, did_you_mean, listed
from aligndistil.report.logs import Log, read_logs
from aligndistil.report.panels import EVAL, known_metrics, off_policy, panel_of, sampled, split_and_name
from aligndistil.report.smoothing import WINDOWS, Array, Usual, half_window, moving_average

UNITS = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}
"""What x counts; any other x is a metric."""
BOOKKEEPING = {"step", "split"}


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
    def deviation(self) -> Array | None:
        """(P,) standard deviation over seeds, with S - 1 in the denominator; None of one seed."""
        return self.values.std(axis=0, ddof=1) if self.seeds > 1 else None

    def reach(self, asked: float | Usual) -> float:
        """The steps on either side that `asked` is for this curve; 0 where no points are so near to each other."""
        steps = asked.on(self.steps) if isinstance(asked, Usual) else float(asked)
        return steps if (np.diff(self.steps) <= steps).any() else 0.0

    def smoothed(self, reach: float | Usual, *, x_too: bool = False) -> Curve:
        """Each seed's moving average over the points within `reach` steps on either side."""
        steps = self.reach(reach)
        values = moving_average(self.steps, self.values, steps)
        return replace(self, values=values, x=moving_average(self.steps, self.x, steps) if x_too else self.x)


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
        label, path = _label_and_path(run)
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


def _label_and_path(run: str) -> tuple[str, Path]:
    label, equals, path = run.partition("=")
    return (label, Path(path)) if equals and not Path(run).exists() else ("", Path(run))


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
    lengths = [0] * len(methods)
    while True:
        labels = [method.names[length] for method, length in zip(methods, lengths, strict=True)]
        often = Counter(labels)
        longer = [
            length + (often[label] > 1 and length + 1 < len(method.names))
            for method, label, length in zip(methods, labels, lengths, strict=True)
        ]
        if longer == lengths:
            return labels
        lengths = longer


def metrics_in(methods: Sequence[Method]) -> list[str]:
    """Every metric that a log has, those of evaluations as `eval/...`."""
    lines = [line for method in methods for log in method.logs for line in log.lines]
    names = {(EVAL if line["split"] == "eval" else "") + name for line in lines for name in line.keys() - BOOKKEEPING}
    return sorted(names)


def curves_of(methods: Sequence[Method], metric: str, x: str = "step") -> Found:
    """A curve for each method that has `metric`.

    `x` is step, tokens (trained on so far), seconds (of training so far, rollouts included, evaluations not), or
    another metric at the same step. A reward of given responses is left out: it does not depend on the policy.
    Raises UserError when no method gives a curve.
    """
    notes: list[str] = []
    drawn: list[tuple[Method, Curve]] = []
    told_of = set()
    for method in methods:
        curve, why = _curve(method, metric, x)
        notes += why
        if curve is not None:
            drawn.append((method, curve))
        if curve is not None or why:
            told_of.add(method.asked)
    if not drawn:
        raise UserError(_why_none(methods, metric, x))
    silent = (run for run in dict.fromkeys(method.asked for method in methods) if run not in told_of)
    notes += [f"{run} has no `{metric}`: it is left out" for run in silent]
    labels = _labels([method for method, _ in drawn])
    marks = [_mark(method, metric) for method, _ in drawn]
    return Found([replace(c, label=n + m) for (_, c), n, m in zip(drawn, labels, marks, strict=True)], notes)


def _mark(method: Method, metric: str) -> str:
    given = split_and_name(metric)[0] == "train" and off_policy(method.logs[0].lines)
    return " (off-policy)" if given and metric.startswith(("kl/", "reward/")) else ""


def _curve(method: Method, metric: str, x: str) -> tuple[Curve | None, list[str]]:
    found = [(log, _points(log, metric, x)) for log in method.logs]
    usable = [(log, points) for log, points in found if points]
    name = method.names[2]
    if not usable:
        return None, _why_not(method, metric, x)
    notes = [f"{name}: {log.seed or log.path} has no `{metric}` yet and is left out" for log, p in found if not p]
    shared = sorted(set.intersection(*(set(points) for _, points in usable)))
    longest = max(max(points) for _, points in usable)
    if not shared:
        return None, [*notes, f"{name}: its seeds have no step in common and are left out"]
    if shared[-1] < longest:
        notes.append(f"{name} ends at step {shared[-1]:g}, where its shortest seed does (the longest: {longest:g})")
    pairs = np.array([[points[step] for step in shared] for _, points in usable])
    return Curve(name, np.array(shared), pairs[:, :, 0], pairs[:, :, 1]), notes


def _points(log: Log, metric: str, x: str) -> dict[float, tuple[float, float]]:
    """(x, value) by step."""
    values = metric_by_step(log.lines, metric)
    at = _elapsed(log.lines, x, list(values)) if x in UNITS else metric_by_step(log.lines, x)
    return {step: (at[step], value) for step, value in values.items() if step in at}


def metric_by_step(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[float, float]:
    """The values of a metric (`eval/...`: of the evaluations); none where it would not depend on the policy."""
    split, name = split_and_name(metric)
    there = (line for line in lines if line["split"] == split and name in line)
    return {line["step"]: line[name] for line in there if sampled(line) or not panel_of(name).on_samples}


def _elapsed(lines: Sequence[Mapping[str, Any]], x: str, steps: Sequence[float]) -> dict[float, float]:
    """What x counts, by step; empty where the log does not say."""
    if x == "step":
        return {step: step for step in steps}
    known = metric_by_step(lines, "num_tokens" if x == "tokens" else "perf/step_seconds")
    if not known:
        return {}
    at, amount = np.array(list(known)), np.array(list(known.values()))
    if x == "seconds":
        # A log that is not of every step stands for the steps since its last line.
        amount = np.cumsum(amount * np.diff(at, prepend=0.0))
    return dict(zip(steps, np.interp(steps, [0.0, *at], [0.0, *amount]).tolist(), strict=True))


def _why_not(method: Method, metric: str, x: str) -> list[str]:
    if any(metric_by_step(log.lines, metric) for log in method.logs):
        return [f"{method.names[2]}: its log does not say the `{x}` of its `{metric}`: left out"]
    if any(_is_of_given(log, metric) for log in method.logs):
        return [f"{method.names[2]}: its `{metric}` is of given responses and does not depend on the policy: left out"]
    return []


def _is_of_given(log: Log, metric: str) -> bool:
    split, name = split_and_name(metric)
    on_samples = name in known_metrics() and known_metrics()[name].on_samples
    return on_samples and any(line["split"] == split and name in line for line in log.lines)


def _why_none(methods: Sequence[Method], metric: str, x: str) -> str:
    there = metrics_in(methods)
    runs = ", ".join(dict.fromkeys(method.asked for method in methods))
    if not there:
        return f"{runs}: nothing has been logged yet"
    for asked, option in ((metric, "--metric"), *([] if x in UNITS else [(x, "--x")])):
        split, name = split_and_name(asked)
        if (EVAL if split == "eval" else "") + name not in there:
            known = there if option == "--metric" else [*UNITS, *there]
            return f"{option}: no stage of {runs} has `{asked}`{_guess(asked, known)}"
        if not any(metric_by_step(log.lines, asked) for method in methods for log in method.logs):
            return (
                f"{option}: `{asked}` is here only of given responses, and does not depend on the policy there: "
                "it is a curve of stages that sample"
            )
    if x in ("tokens", "seconds"):
        return f"--x {x}: the logs do not say how many {UNITS[x]} a step took; `--x step` needs nothing more"
    return f"`{metric}` and `{x}` were never logged at the same step"


def _guess(metric: str, there: Sequence[str]) -> str:
    """The nearest name as a guess, and then all of them, nearest first."""
    from difflib import SequenceMatcher

    # A name that training and evaluation share is listed once, as the one that was asked for.
    evaluated = {name for name in there if name.startswith(EVAL)}
    asked_eval = metric.startswith(EVAL)
    twins = {name.removeprefix(EVAL) for name in evaluated} if asked_eval else {EVAL + name for name in there}
    near = sorted(
        (name for name in there if name not in twins), key=lambda name: -SequenceMatcher(None, metric, name).ratio()
    )
    guess = did_you_mean(metric, there)
    return f"{guess} The metrics are {listed(near)}" if guess else f"; the metrics are {listed(near)}"


def default_reach(curves: Sequence[Curve], windows: int = WINDOWS) -> Usual:
    """Half a twelfth of the steps of the curve of middle length (the shorter of two), of those that have the points."""
    reaches = [half_window(curve.steps, windows) for curve in curves if len(curve.steps) >= 2 * windows]
    return Usual(statistics.median_low(reaches) if reaches else 0.0, windows)
