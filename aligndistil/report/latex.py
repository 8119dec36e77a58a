"""The tables for a paper: LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import wrap

from aligndistil.report.aggregate import winners
from aligndistil.report.columns import Column, captions, main_columns
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

TEXT = 2
"""The first columns, which are not numbers."""
ROOM, BETWEEN = 86, 1.7
"""Characters that a page of 345 points, LaTeX's usual width, has room for in \\footnotesize that is made smaller by a
fifteenth at most, and how many the space between two columns takes."""
LINES, LINE = 56, 62
"""Lines of them on such a page, and how many characters of a caption take as much."""


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex_tables(comparison: Comparison) -> str:
    """A `table` with the main columns and, where rewards were compared, a second.

    Columns have their short headings; the caption has the long ones.
    """
    columns = main_columns(comparison)
    first = winners(comparison, columns)
    rows = [
        [
            *map(_cell, row_head(comparison, result)),
            *(_bold(_cell(column.value(result)), first[column.metric] is result) for column in columns),
        ]
        for result in comparison.results
    ]
    heads = [*table_head(comparison), *map(_short, columns)]
    notes = [*_in_full(comparison, columns), *captions(comparison, columns)]
    text = "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.\n" + _table(heads, rows, notes, "comparison")
    if comparison.rewards:
        cells = reward_cells(comparison.rewards)
        rows = [[_cell(cell) for cell in row] for row in cells.rows]
        text += "\n" + _table(cells.heads, rows, cells.captions, "reward-accuracy")
    return text


def _short(column: Column) -> str:
    """On one line, where a terminal has two."""
    return column.short.replace("-\n", "").replace("\n", " ")


def _in_full(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    longer = [column.heading(comparison) for column in columns if column.heading(comparison) != _short(column)]
    return [f"Headings in full: {', '.join(longer)}."] if longer else []


def _cell(text: str) -> str:
    """With minus signs in front of numbers, where a hyphen would be shorter."""
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", latex_escape(text))


def _bold(cell: str, wins: bool) -> str:
    return f"\\textbf{{{cell}}}" if wins else cell


def _printed(cell: str) -> int:
    """About how many characters are seen of a cell: each command is one."""
    return len(re.sub(r"[{}$]", "", re.sub(r"\\[a-z]+|\\.", "x", cell.removeprefix(r"\textbf"))))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], label: str) -> str:
    """Columns too many for the width of a page stand below the others, or on the next, the first column with them."""
    cells = [max(_printed(row[i]) for row in rows) for i in range(len(heads))]
    stacks = [_stacked(head, max(cell, 8)) for head, cell in zip(heads, cells, strict=True)]
    widths = [max(cell, *map(len, stack)) for cell, stack in zip(cells, stacks, strict=True)]
    tabulars = [
        _tabular([stacks[i] for i in part], [[row[i] for i in part] for row in rows], sum(i < TEXT for i in part))
        for part in _parts(widths)
    ]
    caption = latex_escape(" ".join(notes))
    high = max(1, int((LINES - len(caption) / LINE) // (len(rows) + 3.5)))
    first, *others = [tabulars[i : i + high] for i in range(0, len(tabulars), high)]
    floats = [_float(first, f"  \\caption{{{caption}}}", f"  \\label{{tab:{label}}}")]
    floats += [_float(other, r"  \addtocounter{table}{-1}", r"  \caption{Continued.}") for other in others]
    return "\n".join(floats)


def _float(tabulars: Sequence[str], *caption: str) -> str:
    lines = [
        r"\begin{table}",
        r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
        "\n  \\par\\medskip\n".join(tabulars),
        *caption,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _stacked(head: str, width: int) -> list[str]:
    """In lines, the first after a comma where there is one."""
    pieces = [head] if len(head) <= width else head.replace(", ", ",\n").split("\n")
    return [line for piece in pieces for line in wrap(piece, width, break_on_hyphens=False, break_long_words=False)]


def _parts(widths: Sequence[int]) -> list[list[int]]:
    """The columns of each tabular: as few tabulars as there can be, about equally wide."""

    def within(room: float) -> list[list[int]]:
        parts = [[0]]
        for i in range(1, len(widths)):
            if len(parts[-1]) > 1 and sum(widths[j] + BETWEEN for j in [*parts[-1], i]) > room:
                parts.append([0])
            parts[-1].append(i)
        return parts

    number = len(within(ROOM))
    return next(parts for room in range(ROOM + 1) if len(parts := within(room)) == number)


def _tabular(heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], text: int) -> str:
    """Made smaller where it is wider than the page."""
    high = max(map(len, heads))
    head_rows = zip(*([""] * (high - len(stack)) + list(map(latex_escape, stack)) for stack in heads), strict=True)
    lines = [
        r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        f"  \\begin{{tabular}}{{{'l' * text}{'r' * (len(heads) - text)}}}",
        r"    \toprule",
        *(f"    {' & '.join(row)} \\\\" for row in head_rows),
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
    ]
    return "\n".join(lines)
