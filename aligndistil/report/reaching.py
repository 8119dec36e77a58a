"""How many steps each model of a comparison took to the same reward."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from aligndistil.errors import UserError
from aligndistil.report.curves import Curve, Method, curves_of, default_reach
from aligndistil.report.logs import Log
from aligndistil.report.results import Comparison, ModelResult, Threshold
from aligndistil.report.thresholds import Reached, steps_to

STEPS, NO_STEPS = "steps_to_reward", "No steps to a reward"
CURVES = ("reward/token_mean", "gold_reward", "eval/gold_reward")
"""What is looked at: the first of these that two models have."""

Logs = Mapping[str, Mapping[str, Log]]
"""By row, then by seed; the seed of a single run is its only one."""


def methods_of(logs: Logs) -> list[Method]:
    """The rows with their logs, under their own names."""
    return [Method((row,) * 4, tuple(seeds.values()), row) for row, seeds in logs.items() if seeds]


def curves_by_row(methods: Sequence[Method], metric: str) -> list[Curve]:
    """The curves of the rows that have the metric in every seed, under their names."""
    curves: list[Curve] = []
    for method in methods:
        try:
            (curve,) = curves_of([method], metric).curves
        except UserError:
            continue  # it does not have the metric
        if curve.seeds == len(method.logs):
            curves.append(Curve(method.asked, curve.steps, curve.x, curve.values))
    return curves


def with_steps_to_reward(
    comparison: Comparison, logs: Logs, metric: str | None = None, value: float | None = None
) -> Comparison:
    """`steps_to_reward` of every row that has the curve, and the threshold they are counted to.

    Curves are moving averages over a twelfth of the curve of middle length. Without `value`, `steps_to` chooses it,
    which takes two curves. Rows of several seeds are given the mean over seeds, where all get there; a row that begins
    there is given none. A note says so when no row has the `metric` that was asked for.
    """
    comparison = comparison.model_copy(update={"threshold_metric": metric, "threshold_value": value})
    methods = methods_of(logs)
    for candidate in (metric,) if metric else CURVES:
        curves = curves_by_row(methods, candidate)
        if len(curves) < (2 if value is None else 1):
            continue
        reach = default_reach(curves)
        found = steps_to([curve.smoothed(reach) for curve in curves], value)
        if found is None:
            continue
        reached = {curve.label: one for curve, one in zip(curves, found.reached, strict=True)}
        results = [_with(result, reached.get(result.name), logs.get(result.name, {})) for result in comparison.results]
        threshold = Threshold(metric=candidate, value=found.value, chosen=found.chosen)
        return comparison.model_copy(update={"results": results, "threshold": threshold})
    missing = [f"{NO_STEPS}: no two stages have a curve of {metric} that rises."] if metric else []
    return comparison.model_copy(update={"notes": [*comparison.notes, *missing]})


def _with(result: ModelResult, reached: Reached | None, seeds: Mapping[str, Log]) -> ModelResult:
    if reached is None or reached.from_the_start:
        return result
    if not result.per_seed:
        return _updated(result, {} if reached.x is None else {STEPS: reached.x}, {}, {})
    steps = {seed: x for seed, x in zip(seeds, reached.seeds, strict=True) if x is not None}
    if len(steps) < len(result.per_seed):
        return _updated(result, {}, {}, steps)
    values = list(steps.values())
    return _updated(result, {STEPS: statistics.fmean(values)}, {STEPS: statistics.stdev(values)}, steps)


def _updated(
    result: ModelResult, metrics: dict[str, float], spread: dict[str, float], steps: Mapping[str, float]
) -> ModelResult:
    per_seed = {seed: of | ({STEPS: steps[seed]} if seed in steps else {}) for seed, of in result.per_seed.items()}
    return result.model_copy(
        update={"metrics": result.metrics | metrics, "spread": result.spread | spread, "per_seed": per_seed}
    )
