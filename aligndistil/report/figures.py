"""One metric of several methods as a figure: convergence over steps, or the frontier against another metric."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aligndistil.errors import UserError
from aligndistil.files import write_bytes
from aligndistil.report.captions import caption_of
from aligndistil.report.curves import UNITS, Curve
from aligndistil.report.labels import End, column_height, label_beside, label_in_margin
from aligndistil.report.palette import GROUND, INK, MUTED, looks
from aligndistil.report.panels import panel_of
from aligndistil.report.smoothing import Array, Usual
from aligndistil.report.thresholds import Threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8C8C8C",
    "xtick.color": "#8C8C8C",
    "ytick.color": "#8C8C8C",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "svg.fonttype": "none",
    "svg.hashsalt": "aligndistil",
    "pdf.fonttype": 42,
}
"""Text stays text in SVG and PDF, and the same curves give the same bytes."""
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"dpi": 200, "metadata": {"Software": None}},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}
X_AXES = {"step": "optimizer steps", "tokens": "tokens trained on", "seconds": "seconds of training"}
WIDTH, HEIGHT, LINE = 7.6, 4.2, 0.175
"""Inches: the figure, the axes with their labels where few names stand beside them, a line of the caption."""
AROUND = 1.0
"""Inches above and below the axes, for the title and what x is."""
FEW = 24
"""A line of fewer points shows them."""


def curve_figure(
    curves: Sequence[Curve],
    metric: str,
    x: str = "step",
    *,
    reach: float | Usual = 0.0,
    threshold: Threshold | None = None,
) -> Figure:
    """Draw `curves` (as `curves_of` gives them) smoothed over `reach` steps on either side.

    Several seeds: the mean line and a band of one standard deviation on either side; one seed: its values light behind
    its line. Where x is a metric, each method is a path from its first step to its last. `threshold` is marked, and
    what each method needs to it stands in the caption.
    """
    import matplotlib
    from matplotlib.figure import Figure

    against = x not in UNITS
    caption = caption_of(curves, metric, x, reach, threshold)
    with matplotlib.rc_context(STYLE):
        below = (len(caption) + 1) * LINE if caption else 0.0
        above = HEIGHT if against else max(HEIGHT, AROUND + column_height(len(curves)))
        figure = Figure(figsize=(WIDTH, above + below), dpi=100)
        share = below / (above + below)
        figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share), w_pad=0.1, h_pad=0.1)
        axes = figure.subplots()
        _name_axes(axes, metric, x)
        smooth = [curve.smoothed(reach, x_too=against) for curve in curves]
        if against:
            _draw_paths(axes, smooth)
        else:
            _draw_lines(axes, curves, smooth, reach)
        if threshold is not None:
            _mark(axes, smooth, threshold)
        _label(axes, smooth, against)
        figure.text(
            0.1 / WIDTH, 0.5 * LINE / (above + below), "\n".join(caption), va="bottom", fontsize=8.5, color=MUTED,
            linespacing=1.35, parse_math=False,
        )  # fmt: skip
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # What has been measured stays where it is, whatever it is saved as.
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a .png, .svg or .pdf, the same bytes for the same figure. Raises UserError for any other suffix."""
    import matplotlib

    check_suffix(path)
    image = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(image, format=path.suffix.lower()[1:], **FORMATS[path.suffix.lower()])
    write_bytes(path, image.getvalue())


def check_suffix(path: Path) -> None:
    """Raise UserError unless `path` ends in one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out: {path} must end in .png, .svg or .pdf")


def _name_axes(axes: Axes, metric: str, x: str) -> None:
    panel = panel_of(metric)
    axes.set_title(panel.title if x in UNITS else f"{panel.title} against {panel_of(x).title}", parse_math=False)
    axes.set_ylabel(panel.axis, parse_math=False)
    axes.set_xlabel(X_AXES[x] if x in UNITS else panel_of(x).axis, parse_math=False)
    _format(axes.yaxis, panel.percent)
    _format(axes.xaxis, x not in UNITS and panel_of(x).percent, whole=x in ("step", "tokens"))
    if x not in UNITS:
        axes.grid(True, axis="both")


def _format(axis: Axis, percent: bool, whole: bool = False) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(integer=whole, nbins=7, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif whole:
        axis.set_major_formatter(EngFormatter(sep=""))


def _draw_lines(axes: Axes, curves: Sequence[Curve], smooth: Sequence[Curve], reach: float | Usual) -> None:
    for raw, curve, look in zip(curves, smooth, looks(len(curves)), strict=True):
        x, mean, deviation = curve.mean_x, curve.mean, curve.deviation
        if deviation is not None:
            axes.fill_between(x, mean - deviation, mean + deviation, color=look.line, alpha=0.16, lw=0, zorder=2)
        elif raw.reach(reach) > 0:
            axes.plot(x, raw.mean, color=look.line, lw=0.8, alpha=0.3, zorder=2, label="_values")
        dots = "." if len(x) < FEW else None
        axes.plot(x, mean, color=look.line, ls=look.dashes, lw=2, marker=dots, ms=8, zorder=3, label=curve.label)
        _dot(axes, x[-1], mean[-1], look.dot(6.5, GROUND))
    right = max(float(curve.mean_x[-1]) for curve in curves)
    left = min(float(curve.mean_x[0]) for curve in curves)
    axes.set_xlim(min(0.0, left), right * 1.005 if right > 0 else 1.0)


def _draw_paths(axes: Axes, smooth: Sequence[Curve]) -> None:
    for curve, look in zip(smooth, looks(len(smooth)), strict=True):
        x, mean, deviation = curve.mean_x, curve.mean, curve.deviation
        for one_x, values in zip(curve.x, curve.values, strict=True) if curve.seeds > 1 else ():
            axes.plot(one_x, values, color=look.line, lw=0.7, alpha=0.3, zorder=2, label="_seed")
        axes.plot(x, mean, color=look.line, ls=look.dashes, lw=2, zorder=3, label=curve.label)
        if deviation is not None:
            spread_x = curve.x.std(axis=0, ddof=1)
            axes.errorbar(
                x[-1], mean[-1], xerr=spread_x[-1], yerr=deviation[-1], color=look.line, lw=1.1, capsize=2.5, zorder=4
            )
        # Whatever tells curves apart elsewhere: here a hollow marker is a beginning.
        _dot(axes, x[0], mean[0], look._replace(fill="none").dot(6.5, GROUND))
        _dot(axes, x[-1], mean[-1], look._replace(fill="full").dot(6.5))
    axes.margins(x=0.06, y=0.08)
    left, right = axes.get_xlim()
    if left < 0.3 * right:
        left = 0.0 if min(curve.x.min() for curve in smooth) >= 0 else min(left, 0.0)
    axes.set_xlim(left, right + 0.18 * (right - left))  # room for the names


def _dot(axes: Axes, x: float, y: float, dot: dict[str, Any]) -> None:
    axes.plot(x, y, ls="none", zorder=5, clip_on=False, **dot)


def _mark(axes: Axes, smooth: Sequence[Curve], threshold: Threshold) -> None:
    axes.axhline(threshold.value, color=MUTED, lw=0.9, ls=(0, (1, 2)), zorder=1.5, label="_threshold")
    for curve, one, look in zip(smooth, threshold.reached, looks(len(smooth)), strict=True):
        if one.x is not None:
            y = float(np.interp(one.x, curve.mean_x, curve.mean))
            axes.plot(one.x, y, ls="none", zorder=5, label="_reached", **look._replace(fill="none").dot(6, GROUND))


def _label(axes: Axes, smooth: Sequence[Curve], against: bool) -> None:
    ends = [
        End(curve.label, float(curve.mean_x[-1]), float(curve.mean[-1]), look)
        for curve, look in zip(smooth, looks(len(smooth)), strict=True)
    ]
    if against:
        label_beside(axes, ends, [part for curve in smooth for part in _drawn(curve)])
    else:
        label_in_margin(axes, ends)


def _drawn(curve: Curve) -> list[Array]:
    """Points of a path, of its seeds and of the cross at its end, (P, 2) each: names keep off them."""
    paths = [np.stack(one, axis=1) for one in zip(curve.x, curve.values, strict=True)]
    if curve.seeds > 1:
        paths.append(np.stack([curve.mean_x, curve.mean], axis=1))
        end, arm = paths[-1][-1], np.linspace(-1, 1, 21)[:, None]
        paths += [end + arm * side * np.array(paths)[:-1, -1].std(axis=0, ddof=1) for side in np.eye(2)]
    return paths
