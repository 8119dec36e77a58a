"""The same models trained with several seeds, as one row each; and which of the rows is the best, if any is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from aligndistil.report.columns import Column
from aligndistil.report.results import EACH_OWN, Comparison, ModelResult, RewardResult


def over_seeds(seeds: Mapping[str, ModelResult]) -> ModelResult:
    """Mean and standard deviation (n - 1) of the metrics that every seed has: the mean of some is of other seeds.

    `seeds` are at least two results of one model, by the name of the seed.
    """
    results = list(seeds.values())
    shared = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    columns = {name: [result.metrics[name] for result in results] for name in shared}
    return ModelResult(
        name=results[0].name,
        objective=results[0].objective,
        metrics={name: statistics.fmean(values) for name, values in columns.items()},
        spread={name: statistics.stdev(values) for name, values in columns.items()},
        per_seed={seed: result.metrics for seed, result in seeds.items()},
    )


def rewards_over_seeds(seeds: Sequence[RewardResult]) -> RewardResult:
    """The same reward of several seeds, which must have been measured on the same pairs."""
    first = seeds[0]
    splits = [split for split in first.right if all(split in reward.right for reward in seeds)]
    right = {split: [bits for reward in seeds for bits in reward.right[split]] for split in splits}
    return RewardResult(name=first.name, kind=first.kind, right=right, measured_on=first.measured_on)


def winners(comparison: Comparison, columns: Sequence[Column]) -> dict[str, ModelResult | None]:
    """The best row by column; none by the scores of reward models that are not the same."""
    unlike = {"reward_score"} if comparison.reward.startswith(EACH_OWN) else set()
    return {column.metric: None if column.metric in unlike else best(comparison.results, column) for column in columns}


def best(results: Sequence[ModelResult], column: Column) -> ModelResult | None:
    """The model whose mean is the best by more than chance, or None.

    The best mean must be further from each other model's than the standard deviation of the difference of the two,
    sqrt(s1² + s2²). None for a tie, where a spread is not known (one seed), where no other model has a value, and in
    columns that have no better side.
    """
    metric = column.metric
    those = [result for result in results if metric in result.metrics]
    if column.better is None or len(those) < 2 or any(metric not in result.spread for result in those):
        return None
    sign = 1 if column.better == "higher" else -1
    first = max(those, key=lambda result: sign * result.metrics[metric])

    def beaten(other: ModelResult) -> bool:
        margin = sign * (first.metrics[metric] - other.metrics[metric])
        return margin > math.hypot(first.spread[metric], other.spread[metric])

    return first if all(beaten(other) for other in those if other is not first) else None
