"""The comparison as a table: for the terminal, for a document, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligndistil.report.aggregate import winners
from aligndistil.report.columns import BY_METRIC, NOTHING, Column, captions, main_columns, present, seeds_differ
from aligndistil.report.results import Comparison, ModelResult

_NARROWEST, _WIDEST = 80, 120


def rich_table(comparison: Comparison, width: int | None = None) -> Table:
    """For the terminal, in `width` columns (what the terminal has, from 80 to 120).

    Columns that no model has a value for are not shown. Where there is no room, the objective goes first, and then the
    columns that the recipe has not asked for, the least important one before the others.
    """
    room = width or min(max(Console().width, _NARROWEST), _WIDEST)
    columns, objective = main_columns(comparison), True
    while _width(table := _rich_table(comparison, columns, objective)) > room:
        if not objective and (comparison.columns is not None or len(columns) < 2):
            break
        if not objective:
            columns.remove(max(columns, key=lambda column: column.rank))
        objective = False
    return table


def _width(table: Table) -> int:
    return Console(width=10 * _WIDEST).measure(table).maximum


def _rich_table(comparison: Comparison, columns: Sequence[Column], objective: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.add_column("model", overflow="fold", vertical="bottom")
    heads = table_head(comparison)
    shown = [i for i, head in enumerate(heads) if objective or head != "objective"]
    for i in shown[1:]:
        table.add_column(heads[i], overflow="fold")
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    first = winners(comparison, columns)
    for result in comparison.results:
        values = [
            _bold(escape(column.value(result).replace(" ± ", "±")), first[column.metric] is result, "[bold]", "[/]")
            for column in columns
        ]
        head = row_head(comparison, result)
        table.add_row(*(escape(head[i]) for i in shown), *values)
    table.caption = escape(" ".join(captions(comparison, columns))) or None
    return table


def markdown_table(comparison: Comparison) -> str:
    """All columns, or those the recipe asks for, with what a reader has to know below them."""
    columns = present(comparison)
    first = winners(comparison, columns)
    rows = [
        [
            *row_head(comparison, result),
            *(_bold(column.value(result), first[column.metric] is result, "**", "**") for column in columns),
        ]
        for result in comparison.results
    ]
    heads = [*table_head(comparison), *(column.heading(comparison) for column in columns)]
    notes = "".join(f"\n{line}\n" for line in captions(comparison, columns))
    return markdown(heads, rows, left=2) + notes


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table whose first `left` columns are text and whose others are numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    lines = [list(heads), rule, *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def table_head(comparison: Comparison) -> list[str]:
    """Headings of what `row_head` gives."""
    return ["model", "objective", *(["seeds"] if seeds_differ(comparison.results) else [])]


def row_head(comparison: Comparison, result: ModelResult) -> list[str]:
    """What a row is called; how many seeds it is of, where rows differ in that."""
    seeds = [str(max(1, len(result.per_seed)))] if seeds_differ(comparison.results) else []
    return [result.name, result.objective or NOTHING, *seeds]


def csv_table(results: Sequence[ModelResult]) -> str:
    """Every metric of every model in full precision, under its own name; `METRIC_std` is its spread over seeds."""
    there = list(dict.fromkeys(name for result in results for name in result.metrics))
    metrics = [*(name for name in BY_METRIC if name in there), *(name for name in there if name not in BY_METRIC)]
    several = any(result.spread for result in results)
    columns = [(name, of) for name in metrics for of in (("metrics", "spread") if several else ("metrics",))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [name if of == "metrics" else f"{name}_std" for name, of in columns]
    writer.writerow(["name", "objective", *(["seeds"] if several else []), *heads])
    for result in results:
        values = [getattr(result, of).get(name, "") for name, of in columns]
        seeds = [max(1, len(result.per_seed))] if several else []
        writer.writerow([result.name, result.objective, *seeds, *values])
    return text.getvalue()


def _bold(cell: str, wins: bool, before: str, after: str) -> str:
    return f"{before}{cell}{after}" if wins else cell
