"""frontier.png: what each model's reward costs, in distance from where training began and in length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aligndistil.report.columns import BY_METRIC
from aligndistil.report.figures import STYLE, save_figure
from aligndistil.report.labels import End, label_beside
from aligndistil.report.palette import MUTED, looks
from aligndistil.report.results import Comparison, ModelResult
from aligndistil.report.smoothing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARDS = ("gold_reward", "reward_score", "reward_accuracy")
"""What is drawn upwards: the first that two models have."""
COSTS = ("kl_initial", "length_mean")
WIDTH, HEIGHT = 7.6, 4.8
"""Inches, of one panel."""


def frontier_figure(comparison: Comparison) -> Figure | None:
    """A panel for each cost, a point for each model, a cross of one standard deviation over seeds.

    None where no two models have the same reward and cost.
    """
    panels = [(cost, reward, rows) for cost in COSTS for reward, rows in [_drawable(comparison.results, cost)] if rows]
    if not panels:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**STYLE, "axes.grid.axis": "both"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=100, layout="constrained")
        grid: list[Axes] = figure.subplots(len(panels), 1, squeeze=False).flatten().tolist()
        drawn = []
        for axes, (cost, reward, rows) in zip(grid, panels, strict=True):
            axes.set_ylabel(BY_METRIC[reward].heading(comparison), parse_math=False)
            axes.set_xlabel(BY_METRIC[cost].heading(comparison), parse_math=False)
            drawn.append((axes, *_draw(axes, rows, cost, reward)))
        seeds = {len(row.per_seed) for *_, rows in panels for row in rows}
        if max(seeds) > 1:
            number = f"{seeds.pop()} seeds" if len(seeds) == 1 else "the seeds"
            figure.supxlabel(
                f"Crosses: one standard deviation over {number} on either side.", fontsize=8.5, color=MUTED
            )
        for axes, ends, crosses in drawn:
            label_beside(axes, ends, crosses, zorder=2.5)  # on the crosses, below every marker
        figure.set_layout_engine("none")  # Names stay where there was room for them.
    return figure


def draw_frontier(comparison: Comparison, out: Path) -> Path | None:
    """Write the picture; None, and no file, when there is nothing to draw."""
    figure = frontier_figure(comparison)
    if figure is None:
        return None
    save_figure(figure, out)
    return out


def _drawable(results: Sequence[ModelResult], cost: str) -> tuple[str, list[ModelResult]]:
    for reward in REWARDS:
        rows = [row for row in results if cost in row.metrics and reward in row.metrics]
        if len(rows) > 1:
            return reward, rows
    return "", []


def _draw(axes: Axes, rows: Sequence[ModelResult], x: str, y: str) -> tuple[list[End], list[Array]]:
    """The points to be named, and what else is drawn."""
    ends, crosses = [], []
    arm = np.linspace(-1, 1, 121)[:, None]
    for i, (row, look) in enumerate(zip(rows, looks(len(rows)), strict=True)):
        at, height = row.metrics[x], row.metrics[y]
        # The crosses are light: they are long where seeds differ, and what lies on them has to stay legible.
        x_spread, y_spread = row.spread.get(x), row.spread.get(y)
        axes.errorbar(at, height, y_spread, x_spread, fmt="none", ecolor=look.line, lw=0.9, alpha=0.4, zorder=2)
        # The first seven are filled; what comes later is see-through, and on top.
        axes.plot(at, height, ls="none", zorder=3 + i / 1000, clip_on=False, label=row.name, **look.dot(7))
        ends.append(End(row.name, at, height, look))
        crosses += [np.array([[at, height]]) + arm * side for side in ([x_spread or 0.0, 0.0], [0.0, y_spread or 0.0])]
    axes.margins(x=0.06, y=0.08)
    if x.startswith("kl") and min(end.x for end in ends) >= 0:
        axes.set_xlim(left=0.0)  # There is no KL below 0, though a cross may reach there.
    return ends, crosses
