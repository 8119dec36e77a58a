"""The pictures of a comparison: reward and length over steps, and what reward costs."""

from __future__ import annotations

from pathlib import Path

from aligndistil.report.curves import default_reach
from aligndistil.report.figures import curve_figure, save_figure
from aligndistil.report.frontier import draw_frontier
from aligndistil.report.reaching import CURVES, Logs, curves_by_row, methods_of
from aligndistil.report.results import Comparison
from aligndistil.report.thresholds import steps_to

LENGTH = "completions/mean_length"


def draw_pictures(folder: Path, comparison: Comparison, logs: Logs) -> list[Path]:
    """Write reward.png (the curve that steps are counted on), length.png and frontier.png, each if there is data."""
    rewards = (comparison.threshold.metric,) if comparison.threshold else CURVES
    written = [
        _draw_curve(folder / "reward.png", comparison, logs, rewards),
        _draw_curve(folder / "length.png", comparison, logs, (LENGTH,)),
        draw_frontier(comparison, folder / "frontier.png"),
    ]
    return [path for path in written if path is not None]


def _draw_curve(out: Path, comparison: Comparison, logs: Logs, metrics: tuple[str, ...]) -> Path | None:
    """The first of `metrics` that a row has."""
    methods = methods_of(logs)
    metric = next((metric for metric in metrics if curves_by_row(methods, metric)), None)
    if metric is None:
        return None
    curves = curves_by_row(methods, metric)
    reach = default_reach(curves)
    asked, threshold = comparison.threshold, None
    if asked is not None and asked.metric == metric:
        threshold = steps_to([curve.smoothed(reach) for curve in curves], asked.value)
        threshold = threshold and threshold._replace(chosen=asked.chosen)
    save_figure(curve_figure(curves, metric, reach=reach, threshold=threshold), out)
    return out
