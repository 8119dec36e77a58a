"""The columns of a comparison: heading, how a value is written, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from aligndistil.report.results import Comparison, ModelResult

NOTHING = "-"


class Column(NamedTuple):
    """One metric of docs/metrics.md."""

    metric: str
    short: str
    """On a terminal."""
    title: str
    """In a document; see `Column.heading`."""
    write: Callable[[float], str]
    better: Literal["higher", "lower"] | None = None
    """None for what describes a model without being good or bad: no value of it is the best."""
    rank: int = 99
    """The columns of lowest rank are the first to go where there is no room; 99 is only in files."""

    def heading(self, comparison: Comparison) -> str:
        """The title with the names of this comparison in it."""
        threshold = comparison.threshold
        reached = f"{threshold.metric} {threshold.value:.3g}" if threshold else "a reward"
        return self.title.format(kl_to=comparison.kl_to, reward=comparison.reward, reached=reached)

    def value(self, result: ModelResult) -> str:
        """The mean and, over several seeds, its spread; `-` where there is none."""
        if self.metric not in result.metrics:
            return NOTHING
        mean = self.write(result.metrics[self.metric])
        if self.metric not in result.spread:
            return mean
        return f"{mean.removesuffix('%')} ± {self.write(result.spread[self.metric])}"


COLUMNS = (
    Column("reward_accuracy", "reward\naccuracy", "reward accuracy (held-out pairs)", "{:.1%}".format, "higher", 1),
    Column("gold_reward", "gold\nreward", "gold reward", "{:z.2f}".format, "higher", 2),
    Column("reward_score", "reward\nscore", "score by {reward}", "{:z.2f}".format, "higher", 6),
    Column("kl", "KL", "KL to {kl_to} (nats a sequence)", "{:.2f}".format, None, 3),
    Column("kl_data", "KL on\ndata", "KL to {kl_to} on the data's responses (nats)", "{:.2f}".format),
    Column("kl_initial", "KL to\ninitial", "KL to initial (nats a sequence)", "{:.2f}".format),
    Column("kl_initial_data", "initial,\non data", "KL to initial on the data's responses (nats)", "{:.2f}".format),
    Column("length_mean", "length", "mean length (tokens)", "{:.1f}".format, None, 4),
    Column("length_characters", "charac-\nters", "mean length (characters)", "{:.0f}".format),
    Column("truncated_fraction", "trun-\ncated", "truncated", "{:.1%}".format, None, 8),
    Column("distinct_1", "distinct\n1", "distinct-1", "{:.3f}".format),
    Column("distinct_2", "distinct\n2", "distinct-2", "{:.3f}".format),
    Column("steps_to_reward", "steps to\nreward", "steps to {reached}", "{:,.0f}".format, "lower", 5),
    Column("steps", "steps", "steps", "{:,.0f}".format, None, 9),
    Column("seconds", "secs", "seconds", "{:,.0f}".format, "lower", 7),
    Column("tokens_per_second", "tokens/s", "tokens/s", "{:,.0f}".format, "higher"),
    Column("peak_memory_gib", "GiB", "peak memory (GiB)", "{:.2f}".format, "lower"),
)
BY_METRIC = {column.metric: column for column in COLUMNS}


def present(comparison: Comparison) -> list[Column]:
    """The columns that the recipe asks for, in its order, or else all; those that no model has a value for are not."""
    asked = COLUMNS if comparison.columns is None else [BY_METRIC[metric] for metric in comparison.columns]
    return [column for column in asked if any(column.metric in result.metrics for result in comparison.results)]


def main_columns(comparison: Comparison) -> list[Column]:
    """Those of them that a page has room for."""
    return [column for column in present(comparison) if comparison.columns is not None or column.rank < 99]


def seeds_differ(results: Sequence[ModelResult]) -> bool:
    """Whether the rows are of different numbers of seeds, so that each has to say its own."""
    return len({len(result.per_seed) for result in results}) > 1


def captions(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """Sentences that a reader of a table of these columns needs."""
    there = {column.metric for column in columns}
    lines = {
        "reward_accuracy": "Reward accuracy is of held-out pairs.",
        "reward_score": f"Reward score is the mean score of the samples by {comparison.reward}.",
        "kl": f"KL is to {comparison.kl_to}, in nats, summed over a response of the model's own.",
        "length_mean": "Length is in tokens.",
        "steps_to_reward": _about_threshold(comparison),
    }
    said = [line for metric, line in lines.items() if metric in there]
    return [*said, *_about_seeds(comparison.results), *comparison.notes]


def _about_threshold(comparison: Comparison) -> str:
    threshold = comparison.threshold
    if threshold is None:
        return ""
    return (
        f"Steps to reward: to a moving average of {threshold.metric} of {threshold.value:.3g} ({threshold.chosen}); "
        "- where there is no such curve, where it begins there, or where a seed does not get there."
    )


def _about_seeds(results: Sequence[ModelResult]) -> list[str]:
    counts = {len(result.per_seed) for result in results}
    if max(counts, default=0) < 2:
        return []
    seeds = "the seeds of each row" if len(counts) > 1 else f"{counts.pop()} seeds"
    return [
        f"Mean ± standard deviation over {seeds} (n - 1 in the denominator).",
        "Bold: the best mean, where it is further from every other than the standard deviation of their difference.",
    ]
