"""Which columns a source has, under our names, and which of the known formats they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from datasets import Dataset

from aligndistil.batch import DataKind
from aligndistil.data.records import HH_ANSWER, Record, Unusable, to_records
from aligndistil.data.sources import load_rows
from aligndistil.errors import UserError, nearest
from aligndistil.recipe import Source

COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "messages")
"""Our names. `messages` is also found under the name `conversations`."""
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "hh": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"),),
    "demonstrations": (("messages",), ("prompt", "completion")),
    "prompts": (("prompt",),),
}
"""Format -> the sets of columns, one of which must be there; the first format that fits is the one `auto` takes."""
FEEDS = {
    "preference": frozenset(DataKind),
    "hh": frozenset(DataKind),
    "unpaired": frozenset({DataKind.UNPAIRED, DataKind.RESPONSES, DataKind.PROMPTS}),
    "demonstrations": frozenset({DataKind.RESPONSES, DataKind.PROMPTS}),
    "prompts": frozenset({DataKind.PROMPTS}),
}
"""Format -> the kinds of example its rows can give."""


def find_columns(source: Source, present: Sequence[str]) -> dict[str, str]:
    """Our column name -> theirs, for the columns that are there.

    Raises UserError when `columns` maps a name we do not know, or to a column that is not there.
    """
    for ours, theirs in source.columns.items():
        if ours not in COLUMNS:
            raise UserError(f"data source {source.path}: columns.{ours} is none of {', '.join(COLUMNS)}")
        if theirs not in present:
            near = nearest(theirs, present, cutoff=0.0)
            raise UserError(
                f"data source {source.path}: columns.{ours} names {theirs!r}, which is not there; the nearest is "
                f"{''.join(near)!r} of {_listed(present)}"
            )
    found = {name: name for name in COLUMNS if name in present}
    if "conversations" in present:
        found.setdefault("messages", "conversations")
    return found | source.columns


def find_format(source: Source, columns: Mapping[str, str], rows: Dataset) -> str:
    """The format of a source: what it says, or what its columns (and for HH its first row) show.

    Raises UserError that lists the columns found when they make no known format, or not the one that is named.
    """
    fitting = [name for name, ways in NEEDED.items() if any(set(way) <= set(columns) for way in ways)]
    named = str(source.format)
    if named != "auto" and named not in fitting:
        raise UserError(
            f"data source {source.path}: format {named} needs the columns {_ways(named)}, and the rows have "
            f"{_listed(rows.column_names)}; name them with `columns`"
        )
    if named == "auto" and not fitting:
        known = "; ".join(f"{name}: {_ways(name)}" for name in NEEDED if name != "hh")
        raise UserError(
            f"data source {source.path}: the columns {_listed(rows.column_names)} make no known format ({known}); name "
            "them with `columns`"
        )
    if named == "auto":
        first = rows[0][columns["chosen"]] if "hh" in fitting else None
        is_hh = isinstance(first, str) and first.lstrip().startswith("Human:") and HH_ANSWER in first
        return "hh" if is_hh else fitting[0]
    return named


def check_feeds(source: Source, layout: str, kind: DataKind, *, reverse: bool) -> None:
    """Raises UserError when rows of this format cannot give the examples that the objective learns from."""
    if kind not in FEEDS[layout]:
        able = ", ".join(name for name, kinds in FEEDS.items() if kind in kinds)
        raise UserError(
            f"data source {source.path}: the objective eats {kind}, which {layout} rows do not give; use a source of "
            f"format {able}"
        )
    if reverse and layout == "demonstrations" and kind is DataKind.RESPONSES:
        raise UserError(
            f"data source {source.path}: data.reverse_preferences cannot reverse demonstrations; leave it out"
        )


def read_prompts(source: Source) -> Iterator[Record]:
    """The prompts of a source, row by row, before any token; rows that training leaves out are left out.

    Raises UserError when the source cannot be read, or its columns make no known format.
    """
    rows = load_rows(source)
    columns = find_columns(source, rows.column_names)
    layout = find_format(source, columns, rows)
    for row in rows.select_columns(sorted(set(columns.values()))):
        try:
            yield from to_records({ours: row[theirs] for ours, theirs in columns.items()}, layout, DataKind.PROMPTS)
        except Unusable:
            continue


def _ways(layout: str) -> str:
    return " or ".join("+".join(way) for way in NEEDED[layout])


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(names) + "]"
