"""One source -> its token ids, in batches large enough for the tokenizer to use its threads."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import islice
from typing import Literal

import numpy as np

from aligndistil.batch import DataKind
from aligndistil.data.cache import DESIRABLE, PROMPT_TRUNCATED, RESPONSE_TRUNCATED, SHIFTED, EncodedRows
from aligndistil.data.encoding import Encoded, Encoder
from aligndistil.data.formats import FEEDS, check_feeds, find_columns, find_format
from aligndistil.data.records import Record, Unusable, to_records
from aligndistil.data.sources import load_rows
from aligndistil.recipe import Data, Source

ENCODED_AT_ONCE = 1000
Progress = Callable[[int, int], None]
"""Called with (raw rows done, raw rows known of); the second grows when another source is opened."""


def encode_source(
    source: Source, kind: DataKind, encoder: Encoder, *, reverse: bool, on_progress: Progress | None
) -> EncodedRows:
    """Read and encode every row; those that cannot be used are reported with the reason, not raised.

    Raises UserError when the source is not there or does not fit the objective, ServiceError when the Hub failed.
    """
    raw = load_rows(source)
    columns = find_columns(source, raw.column_names)
    layout = find_format(source, columns, raw)
    check_feeds(source, layout, kind, reverse=reverse)
    tokens, table, origins = array("i"), array("q"), array("q")
    dropped: list[tuple[str, int]] = []
    left_out = done = 0
    used = raw.select_columns(sorted(set(columns.values())))  # only the columns in use are decoded
    rows = (
        (number, {ours: row[theirs] for ours, theirs in columns.items()}) for number, row in enumerate(used, start=1)
    )
    while numbered := list(islice(rows, ENCODED_AT_ONCE)):
        records: list[tuple[int, Record]] = []
        for number, row in numbered:
            try:
                made = to_records(row, layout, kind, reverse=reverse, chat=encoder.chat)
            except Unusable as reason:
                dropped.append((str(reason), number))
                continue
            left_out += not made
            records += [(number, record) for record in made]
        for (number, _), one in zip(records, encoder.encode([record for _, record in records]), strict=True):
            if isinstance(one, Unusable):
                dropped.append((str(one), number))
            else:
                origins.append(number)
                _store(one, tokens, table)
        done += len(numbered)
        if on_progress is not None:
            on_progress(done, len(raw))
    arrays = np.array(tokens, np.int32), np.array(table, np.int64).reshape(-1, 4), np.array(origins, np.int64)
    return EncodedRows(*arrays, rows_read=len(raw), left_out=left_out, dropped=dropped)


def gives(section: Data, which: Literal["train", "eval"], kind: DataKind) -> bool:
    """Whether every source of `section.train` or `section.eval` has rows that examples of `kind` can be made from."""
    sources = (section.train if which == "train" else section.eval) or []
    for source in sources:
        raw = load_rows(source)
        if kind not in FEEDS[find_format(source, find_columns(source, raw.column_names), raw)]:
            return False
    return True


def _store(one: Encoded, tokens: array[int], table: array[int]) -> None:
    for row, truncated in zip(one.rows, one.responses_truncated or (False,), strict=True):
        flags = (
            DESIRABLE * row.label
            + PROMPT_TRUNCATED * one.prompt_truncated
            + RESPONSE_TRUNCATED * truncated
            + SHIFTED * one.shifted
        )
        table.extend((len(tokens), len(row.prompt_ids), len(row.response_ids), flags))
        tokens.extend(row.prompt_ids)
        tokens.extend(row.response_ids)
