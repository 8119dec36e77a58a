"""The tables for a paper: LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aligndistil.report.aggregate import best
from aligndistil.report.columns import captions, main_columns
from aligndistil.report.pairs_table import reward_cells
from aligndistil.report.results import Comparison
from aligndistil.report.table import row_head, table_head

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    # After a line's end these would be its arguments.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex_tables(comparison: Comparison) -> str:
    """A `table` with the main columns and, where rewards were compared, a second; they need the package booktabs."""
    columns = main_columns(comparison)
    winners = {column.metric: best(comparison.results, column) for column in columns}
    rows = []
    for result in comparison.results:
        row = [_cell(cell) for cell in row_head(comparison, result)]
        for column in columns:
            cell = _cell(column.value(result))
            row.append(f"\\textbf{{{cell}}}" if winners[column.metric] is result else cell)
        rows.append(row)
    heads = [*table_head(comparison), *(column.heading(comparison) for column in columns)]
    text = "% Needs \\usepackage{booktabs}.\n" + _table(heads, rows, captions(comparison, columns), "comparison")
    if comparison.rewards:
        cells = reward_cells(comparison.rewards)
        rows = [[_cell(cell) for cell in row] for row in cells.rows]
        text += "\n" + _table(cells.heads, rows, cells.captions, "reward-accuracy")
    return text


def _cell(text: str) -> str:
    """With minus signs in front of numbers, where a hyphen would be shorter."""
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", latex_escape(text))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], label: str) -> str:
    text = 2
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\begin{{tabular}}{{{'l' * text}{'r' * (len(heads) - text)}}}",
        r"    \toprule",
        f"    {' & '.join(map(latex_escape, heads))} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        f"  \\caption{{{latex_escape(' '.join(notes))}}}",
        f"  \\label{{tab:{label}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
