"""What came out of a run: one table, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aligndistil.artefacts.files import write_text
from aligndistil.report.plots import convergence
from aligndistil.report.results import ModelResult, load_results, save_results
from aligndistil.report.table import csv_table, markdown_table, rich_table

__all__ = ["ModelResult", "convergence", "load_results", "rich_table", "save_results", "write_report"]


def write_report(
    folder: Path,
    results: Sequence[ModelResult],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    kl_label: str,
) -> list[Path]:
    """Write comparison.{json,csv,md} and, where there is a curve to draw, convergence.png. Returns what was written.

    `curves` are the lines of each stage's metrics.jsonl; `kl_label` names the model that the KL is measured to.
    """
    written = [folder / "comparison.json", folder / "comparison.csv", folder / "comparison.md"]
    save_results(written[0], results, kl_label)
    write_text(written[1], csv_table(results))
    write_text(written[2], markdown_table(results, kl_label))
    picture = convergence(curves, folder / "convergence.png")
    return [*written, picture] if picture else written
