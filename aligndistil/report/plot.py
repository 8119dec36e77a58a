"""`aligndistil plot`: from runs to a picture, and what to say about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from aligndistil.errors import UserError, for_console
from aligndistil.report.curves import (
    UNITS,
    WINDOWS,
    Crossing,
    Curve,
    Method,
    Reached,
    curves_of,
    default_reach,
    read_methods,
    steps_to,
)
from aligndistil.report.figures import check_suffix, curve_panel, draw, save_figure
from aligndistil.report.logs import metric_info, values_of
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
    """A picture that was written, and what to say about it."""

    path: Path
    figure: Figure
    metric: str
    x: str
    crossing: Crossing | None
    notes: list[str]

    def report(self) -> Iterator[RenderableType]:
        """For the terminal: what was left out, what each method needs to the threshold, where the picture is."""
        for note in self.notes:
            yield f"[yellow]note:[/] {for_console(note)}"
        if self.crossing is not None:
            yield for_console(_in_words(self.crossing, self.x))
            yield _table(self.crossing, self.x)
        yield for_console(f"{self.path}")


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
    if window is not None and not smooth:
        raise UserError("--window says how wide the average is, and --no-smooth that there is none: give one of them")
    methods = read_methods(runs)
    if x == "kl":
        x = _most_common(methods, KLS)
    metric = metric or (REWARD if x in UNITS else _most_common(methods, FRONTIER))
    curves, notes = curves_of(methods, metric, x)
    against = x not in UNITS
    reaches = default_reach(curves, PATH_WINDOWS if against else WINDOWS)
    if not smooth or window is not None:
        reaches = [float(window or 0)] * len(curves)
    drawn = [curve.smoothed(reach, x_too=against) for curve, reach in zip(curves, reaches, strict=True)]
    crossing = None
    if not against and (threshold is not None or (len(curves) > 1 and metric_info(metric).better == "more")):
        crossing = steps_to(drawn, threshold)
    panel = curve_panel(curves, drawn, metric, x)
    if crossing is not None:
        marks = {one.label: one.x for one in crossing.reached if one.x is not None}
        panel = replace(panel, level=crossing.value, marks=marks)
    what = f"{metric} against {x}" if against else metric
    figure = draw([panel], [curve.label for curve in curves], f"{what}. {_caption(curves, reaches, crossing, x)}")
    path = out or Path(what.replace(" against ", "-against-").replace("/", "-") + ".png")
    save_figure(figure, path)
    return Plot(path, figure, metric, x, crossing, notes)


def _most_common(methods: Sequence[Method], metrics: Sequence[str]) -> str:
    return max(metrics, key=lambda metric: sum(any(values_of(log.lines, metric) for log in m.logs) for m in methods))


def _caption(curves: Sequence[Curve], reaches: Sequence[float], crossing: Crossing | None, x: str) -> str:
    """What is drawn, how it was smoothed, and what each method needs to the threshold."""
    said = []
    seeds = sorted({curve.seeds for curve in curves}, reverse=True)
    if seeds[0] > 1:
        said.append(f"Lines: mean over {' or '.join(map(str, seeds))} seeds; bands or bars: its standard error.")
    wide = sorted({reach for reach in reaches if reach})
    if wide:
        steps = f"{wide[0]:g}" if len(wide) == 1 else f"{wide[0]:g} to {wide[-1]:g}"
        some = "Curves of many points" if 0.0 in reaches else "All"
        said.append(f"{some} are moving averages over {steps} steps on either side.")
    if crossing is not None:
        needs = [
            f"{one.label} {_when(one)}" + ("" if one.ratio is None else f" ({one.ratio:.1f}x)")
            for one in crossing.fastest_first
        ]
        said.append(f"{_in_words(crossing, x)} {'; '.join(needs)}.")
    return " ".join(said)


def _in_words(crossing: Crossing, x: str) -> str:
    return f"{UNITS[x].capitalize()} to reach {crossing.value:.3g} ({crossing.chosen}):"


def _when(one: Reached) -> str:
    if one.from_the_start:
        return "from the start"
    return f"never in {_amount(one.last_x)}" if one.x is None else _amount(one.x)


def _amount(x: float | None) -> str:
    if x is None:
        return "never"
    return f"{x:,.0f}" if x >= 100 or x == int(x) else f"{x:.3g}"


def _table(crossing: Crossing, x: str) -> Table:
    heads = ["", UNITS[x], "of the fastest"]
    if max(len(one.seeds) for one in crossing.reached) > 1:
        heads.append("each seed")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for one in crossing.fastest_first:
        ratio, seeds = "-" if one.ratio is None else f"{one.ratio:.1f}x", ", ".join(map(_amount, one.seeds))
        table.add_row(*map(for_console, [one.label, _when(one), ratio, seeds][: len(heads)]))
    return table
