"""The plot command: from runs to a file, and what to say about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from aligndistil.errors import UserError
from aligndistil.report.captions import amount, in_words
from aligndistil.report.curves import (
    UNITS,
    Curve,
    Method,
    curves_of,
    default_reach,
    metric_by_step,
    read_methods,
)
from aligndistil.report.figures import check_suffix, curve_figure, save_figure
from aligndistil.report.panels import panel_of
from aligndistil.report.smoothing import WINDOWS
from aligndistil.report.thresholds import Reached, Threshold, steps_to
from aligndistil.run_folder.outputs import check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REWARD = "reward/token_mean"
FRONTIER = ("gold_reward", REWARD)
KLS = ("kl/policy_teacher", "kl", "objective/kl")
"""What `--x kl` means: the first of these that the most methods have."""
PATH_WINDOWS = 4
"""A path is noisy in both directions."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture that was written, and what it was made of."""

    path: Path
    figure: Figure
    metric: str
    x: str
    curves: list[Curve]
    """Not smoothed."""
    threshold: Threshold | None
    notes: list[str]

    def report(self) -> Iterator[RenderableType]:
        """For the terminal: what was left out, what each method needs to the threshold, where the picture is."""
        for note in self.notes:
            yield f"[yellow]note:[/] {escape(note)}"
        if self.threshold is not None:
            yield escape(in_words(self.threshold, self.x))
            yield _table(self.threshold, self.x)
        yield escape(f"{self.path}")


def plot_runs(
    runs: Sequence[str | Path],
    metric: str | None = None,
    x: str = "step",
    *,
    smooth: bool = True,
    window: float | None = None,
    threshold: float | None = None,
    out: Path | None = None,
) -> Plot:
    """Draw one metric of `runs` and write the picture.

    `x` is step, tokens, seconds or a metric; `kl` is the KL that the runs have. The default metric is the reward of
    the policy's samples, and against a KL the gold reward where there is one. `window` is the number of steps on
    either side that the moving average takes in. Without `threshold` one is chosen for metrics that training raises,
    where there are several methods. Raises UserError for a threshold that is no number, and as `read_methods`,
    `curves_of` and `save_figure` do.
    """
    if out is not None:
        check_suffix(out)
        check_file(out)
    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"--threshold: {threshold} is no value that a curve can reach: give a finite number")
    methods = read_methods(runs)
    if x == "kl":
        x = _most_common(methods, KLS)
    metric = metric or (REWARD if x in UNITS else _most_common(methods, FRONTIER))
    curves, notes = curves_of(methods, metric, x)
    usual = default_reach(curves, WINDOWS if x in UNITS else PATH_WINDOWS)
    reach = (usual if window is None else window) if smooth else 0.0
    reached = _threshold([curve.smoothed(reach) for curve in curves], metric, x, threshold)
    figure = curve_figure(curves, metric, x, reach=reach, threshold=reached)
    path = out or Path(_file_name(metric, x))
    save_figure(figure, path)
    return Plot(path, figure, metric, x, curves, reached, notes)


def _threshold(smooth: Sequence[Curve], metric: str, x: str, asked: float | None) -> Threshold | None:
    if x not in UNITS or (asked is None and (len(smooth) < 2 or not panel_of(metric).rises)):
        return None
    return steps_to(smooth, asked)


def _most_common(methods: Sequence[Method], metrics: Sequence[str]) -> str:
    def having(metric: str) -> int:
        return sum(any(metric_by_step(log.lines, metric) for log in method.logs) for method in methods)

    return max(metrics, key=having)


def _file_name(metric: str, x: str) -> str:
    name = metric if x in UNITS else f"{metric}-against-{x}"
    return name.replace("/", "-") + ".png"


def _table(threshold: Threshold, x: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column(UNITS[x], justify="right")
    table.add_column("of the fastest", justify="right")
    seeds = max(len(one.seeds) for one in threshold.reached) > 1
    if seeds:
        table.add_column("each seed", justify="right")
    for one in threshold.fastest_first:
        table.add_row(*map(escape, _cells(one)[: len(table.columns)]))
    return table


def _cells(one: Reached) -> list[str]:
    needs = f"never in {amount(one.last_x)}" if one.x is None else amount(one.x)
    needs = "from the start" if one.from_the_start else needs
    ratio = "-" if one.ratio is None else f"{one.ratio:.1f}x"
    return [one.label, needs, ratio, ", ".join("never" if x is None else amount(x) for x in one.seeds)]
