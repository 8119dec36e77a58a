"""What came out of a run: one table, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aligndistil.files import write_text
from aligndistil.report.combine import combine
from aligndistil.report.curves import Curve, Method, curves_of, read_methods
from aligndistil.report.figures import curve_figure, save_figure
from aligndistil.report.latex import latex_tables
from aligndistil.report.logs import Log, read_logs
from aligndistil.report.pairs_table import rewards_csv, rewards_markdown, rewards_rich
from aligndistil.report.pictures import draw_pictures
from aligndistil.report.plots import convergence
from aligndistil.report.plotting import Plot, plot_runs
from aligndistil.report.reaching import with_steps_to_reward
from aligndistil.report.results import Comparison, ModelResult, RewardResult, load_results, save_results
from aligndistil.report.runs import Run, is_run, read_runs
from aligndistil.report.table import csv_table, markdown_table, rich_table
from aligndistil.report.thresholds import Reached, Threshold, steps_to
from aligndistil.report.training import training_metrics

__all__ = [
    "Comparison",
    "Curve",
    "Log",
    "Method",
    "ModelResult",
    "Plot",
    "Reached",
    "RewardResult",
    "Run",
    "Threshold",
    "combine",
    "convergence",
    "curve_figure",
    "curves_of",
    "draw_pictures",
    "is_run",
    "load_results",
    "plot_runs",
    "read_logs",
    "read_methods",
    "read_runs",
    "rewards_rich",
    "rich_table",
    "save_figure",
    "save_results",
    "steps_to",
    "training_metrics",
    "with_steps_to_reward",
    "write_report",
]


def write_report(
    folder: Path, comparison: Comparison, curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> list[Path]:
    """Write comparison.{json,csv,md,tex}, reward_accuracy.csv where rewards were compared, and convergence.png.

    `curves` are the lines of each stage's metrics.jsonl: without, or without one to draw, there is no picture.
    Returns what was written.
    """
    texts = {"comparison.csv": csv_table(comparison.results), "comparison.md": markdown_table(comparison)}
    if comparison.rewards:
        texts["comparison.md"] += "\n## Rewards\n\n" + rewards_markdown(comparison.rewards)
        texts["reward_accuracy.csv"] = rewards_csv(comparison.rewards)
    texts["comparison.tex"] = latex_tables(comparison)
    save_results(folder / "comparison.json", comparison)
    for name, text in texts.items():
        write_text(folder / name, text)
    written = [folder / "comparison.json", *(folder / name for name in texts)]
    picture = convergence(curves, folder / "convergence.png") if curves else None
    return [*written, picture] if picture else written
