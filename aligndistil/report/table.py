"""The comparison as a table: for the terminal, for a document, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from aligndistil.report.results import ModelResult

NOTHING = "-"


class Column(NamedTuple):
    """One metric, its heading on a terminal and in a document, and how its value is written."""

    metric: str
    short: str
    title: str
    write: Callable[[float], str]


COLUMNS = (
    Column("reward_accuracy", "reward\naccuracy", "reward accuracy (held-out pairs)", "{:.1%}".format),
    Column("gold_reward", "gold\nreward", "gold reward", "{:z.2f}".format),
    Column("kl", "KL", "KL to {kl_label} (nats a sequence)", "{:.2f}".format),
    Column("length_mean", "length", "mean length (tokens)", "{:.1f}".format),
    Column("truncated_fraction", "trun-\ncated", "truncated", "{:.1%}".format),
    Column("steps", "steps", "steps", "{:,.0f}".format),
    Column("seconds", "secs", "seconds", "{:,.0f}".format),
)


def rich_table(results: Sequence[ModelResult], kl_label: str) -> Table:
    """For the terminal, within 80 columns. Columns that no model has a value for are not shown."""
    columns = _present(results)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.add_column("model", style="bold", overflow="fold", vertical="bottom")
    table.add_column("objective", overflow="fold")
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*map(escape, _cells(result, columns)))
    table.caption = escape(_caption({column.metric for column in columns}, kl_label)) or None
    return table


def _caption(metrics: set[str], kl_label: str) -> str:
    notes = {
        "reward_accuracy": "Reward accuracy is of held-out pairs.",
        "kl": f"KL is to {kl_label}, in nats, summed over a response.",
        "length_mean": "Length is in tokens.",
    }
    return " ".join(note for metric, note in notes.items() if metric in metrics)


def markdown_table(results: Sequence[ModelResult], kl_label: str) -> str:
    """The same table in Markdown."""
    columns = _present(results)
    heads = ["model", "objective", *(column.title.format(kl_label=kl_label) for column in columns)]
    lines = [heads, ["---", "---", *("---:" for _ in columns)], *(_cells(result, columns) for result in results)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def csv_table(results: Sequence[ModelResult]) -> str:
    """Every metric of every model in full precision, under its own name."""
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "objective", *metrics])
    for result in results:
        writer.writerow([result.name, result.objective, *(result.metrics.get(name, "") for name in metrics)])
    return text.getvalue()


def _present(results: Sequence[ModelResult]) -> list[Column]:
    return [column for column in COLUMNS if any(column.metric in result.metrics for result in results)]


def _cells(result: ModelResult, columns: Sequence[Column]) -> list[str]:
    values = (
        column.write(result.metrics[column.metric]) if column.metric in result.metrics else NOTHING
        for column in columns
    )
    return [result.name, result.objective or NOTHING, *values]
