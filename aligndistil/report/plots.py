"""convergence.png: how each stage's metrics move with its optimizer steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aligndistil.files import write_bytes
from aligndistil.report.palette import COLOURS
from aligndistil.report.panels import CONVERGENCE, Line, Panel, off_policy, panel_of, sampled
from aligndistil.report.smoothing import WINDOWS, moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[Line]]

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class Points(NamedTuple):
    """A curve, in the order of its steps."""

    steps: list[float]
    values: list[float]


def convergence(stages: Curves, out: Path) -> Path | None:
    """Draw the lines of each stage's metrics.jsonl; None, and no file, when there is nothing to draw.

    One panel a metric, over optimizer steps: raw training values light, their moving average as a line, evaluations as
    markers. The reward panel is drawn only for stages that sample their responses: on given responses it does not
    depend on the policy.
    """
    panels = [panel for panel in map(panel_of, CONVERGENCE) if any(_has(panel, lines) for lines in stages.values())]
    if not panels:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        across = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
        down = math.ceil(len(panels) / across)
        figure = Figure(figsize=(max(7.0, 4.9 * across), 3.9 * down + 0.6), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.02)
        grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, stages)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, panels, stages)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_bytes(out, image.getvalue())
    return out


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; at the ends it averages what there is."""
    averaged: list[float] = moving_average(np.arange(len(values), dtype=float), np.array(values), window // 2).tolist()
    return averaged


def _points(panel: Panel, lines: Sequence[Line], split: str) -> Points:
    found = [
        (line["step"], line[panel.metric])
        for line in lines
        if line["split"] == split and panel.metric in line and (sampled(line) or not panel.on_samples)
    ]
    return Points([float(step) for step, _ in found], [float(value) for _, value in found])


def _has(panel: Panel, lines: Sequence[Line]) -> bool:
    return any(_points(panel, lines, split).steps for split in ("train", "eval"))


def _draw_panel(axes: Axes, panel: Panel, stages: Curves) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for colour, lines in zip(_colours(stages), stages.values(), strict=True):
        _draw_training(axes, _points(panel, lines, "train"), colour)
        evaluated = _points(panel, lines, "eval")
        trained = _points(panel, lines, "train").steps
        axes.plot(*evaluated, "o" if trained else "o--", lw=1.5, ms=7, color=colour, mec="white", mew=1.2, zorder=4)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.axis)
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlim(left=0)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_training(axes: Axes, points: Points, colour: str) -> None:
    if len(points.steps) < 2 * WINDOWS:
        axes.plot(*points, color=colour, lw=2)
        return
    window = len(points.steps) // WINDOWS
    axes.plot(*points, color=colour, lw=1, alpha=0.25)
    axes.plot(points.steps, smooth(points.values, window), color=colour, lw=2.2)


def _colours(stages: Curves) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(stages))]


def _legend(figure: Figure, panels: Sequence[Panel], stages: Curves) -> None:
    from matplotlib.lines import Line2D

    drawn = [
        Line2D([], [], color=colour, lw=2.2, label=_label(name, lines))
        for colour, (name, lines) in zip(_colours(stages), stages.items(), strict=True)
        if any(_has(panel, lines) for panel in panels)
    ]
    if any(_points(panel, lines, "eval").steps for panel in panels for lines in stages.values()):
        drawn.append(
            Line2D([], [], ls="none", marker="o", ms=6.5, color="#707070", label="evaluation, on the eval data")
        )
    figure.legend(handles=drawn, loc="outside lower center", ncols=min(5, len(drawn)))


def _label(stage: str, lines: Sequence[Line]) -> str:
    """On given responses a KL is another quantity than on the policy's own: the legend says which."""
    return f"{stage} (off-policy)" if off_policy(lines) else stage
