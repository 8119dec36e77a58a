"""Pictures: panels of lines, the same for convergence, reward, length and what a reward costs.

A method has one colour, dashes and marker in all pictures of a report. The ground is white and opaque, so that a
picture is legible on a dark page; lines differ in dashes and marks for grey print and for the colour-blind.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aligndistil.errors import UserError
from aligndistil.files import write_bytes
from aligndistil.report.curves import REWARDS, UNITS, Array, Curve, Logs, curves_by_row, smoothed
from aligndistil.report.logs import EVAL, metric_info
from aligndistil.report.results import INITIAL, Comparison
from aligndistil.report.tables import BENCHMARKS, BY_METRIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness, darkened to a contrast of 3 with white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C68900", "#4B9DCB", "#000000")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (2.5, 2.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GROUND, INK, MUTED = "#FFFFFF", "#262626", "#595959"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#8C8C8C"),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), GROUND),
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
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
WIDTH, HEIGHT = 4.6, 3.5
"""Inches of a panel."""
NAME = 38
"""Characters of a line in the legend."""
FEW = 24
"""A line of fewer points shows them."""
MANY = 8
"""Of more trainings a picture shows one a method, and no single seeds."""
BANDS = 3
"""Of more lines with an error, the bands would cover each other: each then has a bar at its end instead."""
CONVERGENCE = (
    "gold_reward",
    "kl_initial",
    "completions/mean_length",
    "reward/token_mean",
    "rewards/margins",
    "rewards/accuracies",
)
"""The panels of convergence.png: those that some stage has."""
CAPTION = (
    "Lines without marks: moving averages of what training logged (light: as it was logged). Lines with marks: "
    "evaluations, on held-out data."
)
"""Of convergence.png."""
COSTS = ("kl_initial", "compute_seconds", "completions/mean_length")
"""What a reward is drawn against."""
PICTURES = ("convergence.png", "reward.png", "length.png", "reward-over-kl.png", "frontier.png", "judged.png")
"""Those of a comparison, each where there is something to draw."""
MODEL_REWARDS = ("gold_reward", "reward_score", "rewards/accuracies")
"""Of a model, the first that two have."""


Look = dict[str, Any]
"""What matplotlib calls colour, dashes and marker of a line."""


def looks(method_of: Mapping[str, str], methods: Sequence[str]) -> dict[str, Look]:
    """By label. Trainings of one method have its colour and marker, and other dashes and fill each.

    After seven methods the colours come again with other dashes and another, hollow marker.
    """
    n = len(COLOURS)
    # Where several runs began from different models, each is called `initial (RUN)`.
    initial = {method for method in methods if re.match(rf"{INITIAL}( \(|$)", method)}
    trained = list(dict.fromkeys(method for method in methods if method not in initial))
    found: dict[str, Look] = {}
    turns = Counter[str]()
    for label, method in method_of.items():
        i, turn = 0 if method in initial else trained.index(method), turns[method]
        colour, marker = (MUTED, "*") if method in initial else (COLOURS[i % n], MARKERS[(i + i // n) % n])
        filled = GROUND if (i // n + turn) % 2 else colour
        dashes = DASHES[(i + i // n + turn) % n]
        found[label] = {"color": colour, "ls": dashes, "marker": marker, "mfc": filled, "mec": colour}
        turns[method] += 1
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """Points of one method, joined."""

    method: str
    """Lines of the same method share colour and marker."""
    label: str
    x: Array
    """(P,)"""
    y: Array
    """(P,)"""
    x_error: Array | None = None
    """(P,) standard errors, as are the next."""
    y_error: Array | None = None
    faint: Sequence[tuple[Array, Array]] = ()
    """What lies behind the line: values that it averages, or each seed."""
    models: bool = False
    """Whether each point is a model of its own, and not a moment of one training."""
    marked: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_unit: str = ""
    """`share`, which is written in percent, or `count`."""
    y_unit: str = ""
    level: float | None = None
    """A value that is marked."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """The x at which the line of a label first reaches it."""


def draw(panels: Sequence[Panel], methods: Sequence[str], caption: str = "") -> Figure:
    """A figure of panels with one legend; the only function that draws.

    `methods` are all methods of a report in their order, which decides how each looks. The legend of a single panel is
    sorted by the lines' last values, that of several by method. Lines with errors have a band, or, where there are many
    or where points are models, bars.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    alone = len(panels) == 1
    order = list({line.label: line for panel in panels for line in panel.lines}.values())
    look_of = looks({line.label: line.method for line in order}, methods)
    if alone:
        order.sort(key=lambda line: -float(line.y[-1]))
    names = ["\n".join(textwrap.wrap(line.label, NAME)) for line in order]
    entry = 0.75 + 0.085 * max(len(part) for name in names for part in name.split("\n"))  # inches
    across = min(len(panels), 2 if len(panels) in (3, 4) else 3)
    down = math.ceil(len(panels) / across)
    spare = across * down > len(panels)
    width = across * WIDTH + (entry if alone else 0.0)
    columns = max(1, min(int(width / entry), len(names)))
    above = 0.0 if alone or spare else 0.2 * math.ceil(len(names) / columns)
    height = max(down * HEIGHT, 0.17 * sum(name.count("\n") + 1 for name in names) + 0.3 if alone else 0.0)
    lines = textwrap.wrap(caption, int(16 * width))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, above + height + 0.16 * len(lines)), dpi=100)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, look_of)
        for axes in grid[len(panels) :]:
            axes.axis("off")
        legend: dict[str, Any] = {
            "handles": [
                Line2D([], [], label=name, **_style(look_of[line.label], line))
                for name, line in zip(names, order, strict=True)
            ],
            "handlelength": 3,
        }
        if alone:
            figure.legend(loc="outside right upper", **legend)
        elif spare:  # where another panel would be
            grid[len(panels)].legend(loc="center left", **legend)
        else:
            figure.legend(loc="outside upper center", ncols=columns, **legend)
        if lines:
            figure.supxlabel("\n".join(lines), x=0.1 / width, ha="left", fontsize=8.5, color=MUTED)
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)
    return figure


def _style(look: Look, line: Line) -> Look:
    if line.models:
        return look | {"ls": "solid" if len(line.x) > 1 else "none", "lw": 1.2, "ms": 6.0}
    return look | {"lw": 1.9, "ms": 4.5, "marker": look["marker"] if line.marked else None}


def _draw_panel(axes: Axes, panel: Panel, look_of: Mapping[str, Look]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    errors = sum(line.y_error is not None for line in panel.lines)
    for line in panel.lines:
        style = _style(look_of[line.label], line)
        colour = style["color"]
        for x, y in line.faint:
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.3, zorder=2)
        if line.models:  # from small to large, in the order of the settings
            axes.plot(line.x, line.y, zorder=3, **style | {"marker": None, "alpha": 0.6})
            sizes = np.linspace(0.7, 1.3, len(line.x)) if len(line.x) > 1 else [1.0]
            for x, y, size in zip(line.x, line.y, sizes, strict=True):
                axes.plot(x, y, zorder=4, clip_on=False, **style | {"ms": 7 * size, "ls": "none"})
        else:
            axes.plot(line.x, line.y, zorder=3, label=line.label, **style)
        if line.y_error is not None and not line.models and errors <= BANDS:
            low, high = line.y - line.y_error, line.y + line.y_error
            axes.fill_between(line.x, low, high, color=colour, alpha=0.16, lw=0, zorder=2)
        elif line.y_error is not None:
            at = slice(None) if line.models else slice(-1, None)
            across = None if line.x_error is None else line.x_error[at]
            axes.errorbar(
                line.x[at], line.y[at], line.y_error[at], across, fmt="none", ecolor=colour, lw=0.9, alpha=0.5,
                zorder=2,
            )  # fmt: skip
        if line.label in panel.marks:
            reached = panel.marks[line.label]
            height = np.interp(reached, line.x, line.y)
            axes.plot(reached, height, ls="none", marker="o", ms=6, mfc=GROUND, mec=colour, zorder=5)
    if panel.level is not None:
        axes.axhline(panel.level, color=MUTED, lw=0.9, ls=(0, (1, 2)), zorder=1.5)
    axes.set_title(panel.title)
    axes.set_xlabel(textwrap.fill(panel.x_label, 44))
    axes.set_ylabel(textwrap.fill(panel.y_label, 30))
    for axis, unit in ((axes.xaxis, panel.x_unit), (axes.yaxis, panel.y_unit)):
        axis.set_major_locator(MaxNLocator(integer=unit == "count", nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if unit == "share":
            axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        elif unit == "count":
            axis.set_major_formatter(EngFormatter(sep=""))
    every_x = np.concatenate([line.x for line in panel.lines])
    if 0 <= every_x.min() < 0.3 * every_x.max():
        axes.set_xlim(left=0.0)


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


# ---- what is drawn


def curve_panel(
    curves: Sequence[Curve], drawn: Sequence[Curve], metric: str, x: str, comparison: Comparison | None = None
) -> Panel:
    """One metric of several methods over x; `drawn` are the curves as they are drawn, smoothed or not.

    Curves are called by their labels, which may be rows of a comparison: then as it calls them.
    """
    against = x not in UNITS
    rows = {result.name: result for result in comparison.results} if comparison else {}
    lines = []
    for raw, curve in zip(curves, drawn, strict=True):
        faint = []
        if against and curve.seeds > 1 and len(curves) <= MANY / 2:
            faint = list(zip(curve.x, curve.values, strict=True))
        elif raw.seeds == 1 and not np.array_equal(raw.values, curve.values):
            faint = [(raw.mean_x, raw.mean)]
        row = rows.get(curve.label)
        method, label = (curve.label, curve.label) if row is None else (row.method or row.name, row.label)
        error = None if against else curve.error  # a band along a path would cross itself
        few = len(curve.steps) < FEW
        lines.append(Line(method, label, curve.mean_x, curve.mean, y_error=error, faint=faint, marked=few))
    y = metric_info(metric)
    if not against:
        return Panel(y.title, X_AXES[x], y.axis, lines, "" if x == "seconds" else "count", y.unit)
    of_x = metric_info(x)
    title = f"{y.title} by {of_x.title}".replace(" (evaluation)", "")
    return Panel(title, of_x.axis, y.axis, lines, of_x.unit, y.unit)


def pictures(comparison: Comparison, logs: Logs) -> dict[str, Figure]:
    """Those of PICTURES that there is something to draw for."""
    results, chosen = comparison.results, ""
    logged = [result for result in results if logs.get(result.name)]
    last = {result.method or result.name: result.name for result in logged}
    if len(logged) > MANY and len(last) < len(logged):  # more than can be told apart
        logs, chosen = {name: logs[name] for name in last.values()}, "Of methods with several settings, the last."
    several = any(result.seeds > 1 for result in results)
    seeds = " or ".join(map(str, sorted({result.seeds for result in results})))
    found: dict[str, Figure] = {}

    def add(name: str, panels: Sequence[Panel], *caption: str) -> None:
        if panels:
            methods = [result.method or result.name for result in results]
            found[name] = draw(panels, methods, " ".join(filter(None, caption)))

    panels = [panel for metric in CONVERGENCE if (panel := _convergence_panel(comparison, logs, metric)) is not None]
    add("convergence.png", panels, CAPTION, "Bands or bars: the standard error over seeds." if several else "", chosen)
    for name, metrics, x in (
        ("reward.png", (comparison.threshold.metric,) if comparison.threshold else REWARDS, "step"),
        ("length.png", ("completions/mean_length",), "step"),
        ("reward-over-kl.png", ("eval/gold_reward",), "eval/kl_initial"),
    ):
        curves_of_metric = ((metric, list(curves_by_row(logs, metric, x).values())) for metric in metrics)
        metric, curves = next(filter(itemgetter(1), curves_of_metric), ("", []))
        drawn, what, error = curves, "Evaluations, from first to last.", ""
        if x == "step":
            drawn, what = smoothed(curves), "Lines of 24 points or more are moving averages."
            error = "; bands or bars: its standard error"
        if curves:
            panel = curve_panel(curves, drawn, metric, x, comparison)
            add(name, [panel], what, f"Mean over {seeds} seeds{error}." if several else "", chosen)
    panels = [panel for cost in COSTS if (panel := _cost_panel(comparison, cost)) is not None]
    over = f"over prompts and {seeds} seeds" if several else "over prompts (one training)"
    errors = f"Bars: standard errors, {over}." if any(result.errors for result in results) else ""
    joined = any(len(line.x) > 1 for panel in panels for line in panel.lines)
    marks = "A line joins the models of one method, whose marks grow in the order of the legend." if joined else ""
    add("frontier.png", panels, errors, marks)
    if (judged := _judged(comparison)) is not None:
        found["judged.png"] = judged
    return found


def _judged(comparison: Comparison) -> Figure | None:
    """What judges say of each model: a row of dots with their 95 % intervals for each model, a panel for each score."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = [column for column in BENCHMARKS if column.better and column.rank <= 2]
    measured = {column: [row for row in comparison.results if column.metric in row.metrics] for column in columns}
    columns = [column for column in columns if measured[column]]
    if not columns:
        return None
    rows = [row for row in comparison.results if any(row in measured[column] for column in columns)]
    names = ["\n".join(textwrap.wrap(row.label, NAME)) for row in rows]
    look_of = looks({row.label: row.method or row.name for row in rows}, [row.method or row.name for row in rows])
    across = min(len(columns), 3)
    down = math.ceil(len(columns) / across)
    size = (1.2 + across * 0.75 * WIDTH, down * (0.9 + 0.27 * sum(name.count("\n") + 1 for name in names)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey=True).flatten().tolist()
        for axes, column in zip(grid, columns, strict=False):
            for place, row in enumerate(rows):
                if row in measured[column]:
                    mean = row.metrics[column.metric]
                    low, high = row.intervals.get(column.metric, (mean, mean))
                    look = {**look_of[row.label], "ls": "none", "ecolor": look_of[row.label]["color"]}
                    axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], capsize=3, **look)
            axes.set_xlabel(column.heading(comparison))
            axes.set_yticks(range(len(rows)), names)
        grid[0].set_ylim(len(rows) - 0.5, -0.5)
        for axes in grid[len(columns) :]:
            axes.axis("off")
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)
    return figure


def _convergence_panel(comparison: Comparison, logs: Logs, metric: str) -> Panel | None:
    """A metric of training over steps.

    What only an evaluation knows of a stage (the gold reward of one that samples nothing) is drawn from that.
    """
    curves = curves_by_row(logs, metric)
    trained = len(curves)
    if metric != "reward/token_mean":  # evaluations measure that of given responses
        curves |= {row: curve for row, curve in curves_by_row(logs, EVAL + metric).items() if row not in curves}
    if not curves:
        return None
    raw = list(curves.values())
    panel = curve_panel(raw, smoothed(raw), metric, "step", comparison)
    return replace(panel, lines=[replace(line, marked=i >= trained) for i, line in enumerate(panel.lines)])


def _cost_panel(comparison: Comparison, cost: str) -> Panel | None:
    """A point for each model, those of one method joined."""
    # Scores of reward models that differ from run to run have no common axis.
    unlike = {"reward_score"} if comparison.reward and not comparison.reward.same_in_all_runs else set()
    for reward in (metric for metric in MODEL_REWARDS if metric not in unlike):
        rows = [row for row in comparison.results if cost in row.metrics and reward in row.metrics]
        if len(rows) > 1:
            break
    else:
        return None
    lines = []
    for method in dict.fromkeys(row.method or row.name for row in rows):
        those = [row for row in rows if (row.method or row.name) == method]
        settings = " / ".join(row.setting or "default" for row in those) if any(row.setting for row in those) else ""
        x, y = (np.array([row.metrics[metric] for row in those]) for metric in (cost, reward))
        dx, dy = (np.array([row.errors.get(metric, 0.0) for row in those]) for metric in (cost, reward))
        lines.append(Line(method, f"{method}: {settings}" if settings else method, x, y, dx, dy, models=True))
    across, up = (BY_METRIC[metric].heading(comparison) for metric in (cost, reward))
    y_unit = "share" if reward == "rewards/accuracies" else ""
    return Panel(f"By {across.partition(' (')[0]}", across, up, lines, y_unit=y_unit)
