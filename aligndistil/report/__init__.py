"""What came out of runs: tables and pictures.

`logs` and `runs` read what lies on disk; `combine` puts runs together, with `statistics` for errors and tests; `curves`
are made of logs; `tables` and `figures` show it all; `plot` is the command.
"""

from __future__ import annotations

from pathlib import Path

from aligndistil.files import write_text
from aligndistil.report import tables
from aligndistil.report.combine import combine, with_statistics
from aligndistil.report.curves import Logs, curves_of, read_methods, steps_to
from aligndistil.report.figures import PICTURES, pictures, save_figure
from aligndistil.report.logs import step_seconds, training_metrics
from aligndistil.report.plot import plot_runs
from aligndistil.report.results import (
    ComparedWith,
    Comparison,
    Measured,
    ModelResult,
    RewardResult,
    load_results,
    read_measured,
    save_results,
)
from aligndistil.report.runs import is_run, read_runs
from aligndistil.report.tables import rich_differences, rich_rewards, rich_table, summary

__all__ = [
    "ComparedWith",
    "Comparison",
    "Measured",
    "ModelResult",
    "RewardResult",
    "combine",
    "curves_of",
    "is_run",
    "load_results",
    "pictures",
    "plot_runs",
    "read_measured",
    "read_methods",
    "read_runs",
    "rich_differences",
    "rich_rewards",
    "rich_table",
    "save_figure",
    "save_results",
    "step_seconds",
    "steps_to",
    "summary",
    "training_metrics",
    "with_statistics",
    "write_report",
]


def write_report(folder: Path, comparison: Comparison, logs: Logs) -> list[Path]:
    """Write comparison.{json,csv,md,tex}, differences and rewards as .csv, and the pictures; what was written."""
    texts = {
        "comparison.csv": tables.csv(comparison),
        "comparison.md": tables.markdown(comparison),
        "comparison.tex": tables.latex(comparison),
        "differences.csv": tables.differences_csv(comparison),
        "reward_accuracy.csv": tables.rewards_csv(comparison.rewards if comparison.show_rewards else []),
    }
    figures = pictures(comparison, logs)
    written = ["comparison.json", *(name for name, text in texts.items() if text), *figures]
    for name in {*texts, *PICTURES} - {*written}:
        (folder / name).unlink(missing_ok=True)  # of a report that stood here before
    save_results(folder / "comparison.json", comparison)
    for name, text in texts.items():
        if text:
            write_text(folder / name, text)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in written]
