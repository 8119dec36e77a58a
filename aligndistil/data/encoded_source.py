"""One source -> its token ids, piece by piece, in as many processes as are worth their start."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from aligndistil.batch import DataKind
from aligndistil.data.cache import DESIRABLE, PROMPT_TRUNCATED, RESPONSE_TRUNCATED, SHIFTED, EncodedRows, Pieces
from aligndistil.data.encoding import Encoded, Encoder
from aligndistil.data.formats import (
    FEEDS,
    check_feeds,
    find_columns,
    find_format,
    read_columns,
    under_our_names,
    unread_columns,
)
from aligndistil.data.records import HH_TURN, Messages, Record, Unusable, to_records
from aligndistil.data.report import Dropped
from aligndistil.data.sources import Opened, load_rows
from aligndistil.data.workers import in_processes
from aligndistil.recipe import Data, Source
from aligndistil.recipe.sections import HeldOut

ROWS_OF_A_PIECE = 1000
BYTES_OF_A_ROW = 500
"""What a row costs beside its text, as bytes of text."""
BYTES_OF_A_WORKER = 8_000_000
"""A worker starts in the time in which it could prepare about so much."""
FILES_NAMED = 20
PROMPTS_SHOWN, PROMPT_SHOWN = 3, 60
"""How many prompts that are not written as such a report shows, and characters of each."""
MOST_WORKERS = 32
"""More wait for the one process that reads and writes."""
Progress = Callable[[int, int], None]
"""Called with (raw rows done, raw rows known of); the second grows when another source is opened."""


def sources_of(section: Data, which: Literal["train", "eval"]) -> list[Source]:
    """The sources that `data.train` or `data.eval` is read from: those of the training data where it is a share."""
    return section.train if which == "train" or isinstance(section.eval, HeldOut) else section.eval or []


def check_source(source: Source, kind: DataKind, *, reverse: bool = False) -> None:
    """Whether a source can be read, and is what it should be, by its first rows and no token.

    Raises UserError when the source is not there or does not fit an objective whose data are `kind`, ServiceError when
    the Hub failed.
    """
    raw = load_rows(source)
    layout = find_format(source, find_columns(source, raw), raw)
    check_feeds(source, layout, kind, raw, reverse=reverse)


def encode_source(
    source: Source,
    opened: Opened,
    kind: DataKind,
    encoder: Encoder,
    *,
    reverse: bool,
    workers: int | None,
    on_progress: Progress | None,
) -> Pieces:
    """Read and encode every row, a piece at a time, in file order. Rows that cannot be used are counted, not raised.

    `workers` processes are started where there is enough for each of them to do; None is as many as there are cores.
    Nothing but the time depends on their number.

    Raises UserError when the source does not fit the objective.
    """
    raw = opened.rows
    columns = find_columns(source, raw)
    layout = find_format(source, columns, raw)
    check_feeds(source, layout, kind, raw, reverse=reverse)
    used = raw.select_columns(read_columns(columns, raw.column_names))  # only the columns in use are decoded
    task = _EncodePiece(columns, layout, kind, reverse, source.templated, encoder, used.features)
    count = _worth_starting(used, workers)
    pieces = in_processes(task, _pieces(used), count) if count > 1 else (task(piece) for piece in _pieces(used))
    notes = _notes(source, opened, unread_columns(columns, raw.column_names))
    if "prompt" not in columns:
        notes += _shared_prompts(used.select(range(min(ROWS_OF_A_PIECE, len(used)))), columns, layout)
    yield _Rows().encoded(0, 0, {}, notes)
    done = 0
    with closing(pieces):
        for encoded in pieces:
            yield encoded
            done += encoded.rows_read
            if on_progress is not None:
                on_progress(done, len(raw))


def gives(section: Data, which: Literal["train", "eval"], kind: DataKind) -> bool:
    """Whether every source of `section.train` or `section.eval` has rows that examples of `kind` can be made from."""
    for source in sources_of(section, which):
        raw = load_rows(source)
        if kind not in FEEDS[find_format(source, find_columns(source, raw), raw)]:
            return False
    return True


def _notes(source: Source, opened: Opened, unread: Sequence[str]) -> list[str]:
    """Which files were read, where it is not the one that the recipe names, and which columns were not."""
    files = [f"{file.name} ({file.rows} rows)" for file in opened.files]
    first = opened.files[0].name
    named = source.path.endswith(first) or first.startswith(source.path)  # a file itself, or a data set of the Hub
    notes = [f"read: {some(files)}"] if len(files) > 1 or not named else []
    if unread:
        notes.append(f"columns that nothing reads: {', '.join(unread)}")
    return notes


def _shared_prompts(rows: Dataset, columns: Mapping[str, str], layout: str) -> list[str]:
    """Some of the prompts that no column holds, where chosen and rejected are text that begins with them."""
    shown: list[str] = []
    for row in (under_our_names(row, columns) for row in rows):
        if layout != "preference" or len(shown) == PROMPTS_SHOWN:
            break
        try:
            [record] = to_records(row, layout, DataKind.PAIRS, chat=False)
        except Unusable:
            continue
        if isinstance(record.prompt, str):
            shown.append(shorten(record.prompt, PROMPT_SHOWN, placeholder=" ..."))
    return [f"prompts are what chosen and rejected begin with: {', '.join(map(repr, shown))}, ..."] if shown else []


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - FILES_NAMED} more" if len(names) > FILES_NAMED else ""
    return ", ".join(names[:FILES_NAMED]) + more


def prompt_hash(prompt: str | Messages) -> int:
    """64 bits of a prompt's text, whichever way the row writes it: with or without turns, their names, outer space."""
    texts = HH_TURN.split(prompt)[::2] if isinstance(prompt, str) else [turn.get("content") or "" for turn in prompt]
    return _hash("\0".join(filter(None, (text.strip() for text in texts))).encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _worth_starting(rows: Dataset, asked: int | None) -> int:
    """How many workers a source is given, by the size of its first piece."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = next(_pieces(rows))
    size = len(rows) * (BYTES_OF_A_ROW + len(first.content) / min(len(rows), ROWS_OF_A_PIECE))
    return max(1, min(asked or min(cores, MOST_WORKERS), math.ceil(size / BYTES_OF_A_WORKER)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a source, as Arrow writes them: sliced tables would be pickled with all that they were cut from."""

    first: int
    """The number of its first row, from 1."""
    content: bytes


def _pieces(rows: Dataset) -> Iterator[_Piece]:
    as_arrow = rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_OF_A_PIECE):
        table: pa.Table = as_arrow[start : start + ROWS_OF_A_PIECE]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        yield _Piece(start + 1, sink.getvalue().to_pybytes())


@dataclass(frozen=True, slots=True)
class _EncodePiece:
    """What a worker does with a piece: a pure function of it."""

    columns: Mapping[str, str]
    layout: str
    kind: DataKind
    reverse: bool
    templated: bool
    encoder: Encoder
    features: Features

    def __call__(self, piece: _Piece) -> EncodedRows:
        table = pa.ipc.open_stream(piece.content).read_all()
        columns: dict[str, list[Any]] = self.features.decode_batch(table.to_pydict())
        dropped: dict[str, Dropped] = {}
        records: list[tuple[int, Record]] = []
        left_out = 0
        for k in range(len(table)):
            row = under_our_names({name: values[k] for name, values in columns.items()}, self.columns)
            try:
                made = to_records(
                    row,
                    self.layout,
                    self.kind,
                    reverse=self.reverse,
                    chat=self.encoder.chat,
                    templated=self.templated,
                )
            except Unusable as reason:
                dropped.setdefault(str(reason), Dropped()).add(piece.first + k)
                continue
            left_out += not made
            records += [(piece.first + k, record) for record in made]
        rows = _Rows()
        for (number, record), one in zip(records, self.encoder.encode([record for _, record in records]), strict=True):
            if isinstance(one, Unusable):
                dropped.setdefault(str(one), Dropped()).add(number)
            else:
                rows.add(number, record, one)
        return rows.encoded(len(table), left_out, dropped)


class _Rows:
    """The arrays of a piece while they grow."""

    def __init__(self) -> None:
        self.tokens, self.rows, self.hashes = array("i"), array("q"), array("Q")
        self.origins, self.prompts = array("q"), array("Q")

    def add(self, number: int, record: Record, encoded: Encoded) -> None:
        self.origins.append(number)
        self.prompts.append(prompt_hash(record.prompt))
        for row, truncated in zip(encoded.rows, encoded.responses_truncated or (False,), strict=True):
            flags = (
                DESIRABLE * row.label
                + PROMPT_TRUNCATED * encoded.prompt_truncated
                + RESPONSE_TRUNCATED * truncated
                + SHIFTED * encoded.shifted
            )
            prompt, response = array("i", row.prompt_ids), array("i", row.response_ids)
            self.rows.extend((len(self.tokens), len(prompt), len(response), flags))
            whole = len(prompt).to_bytes(8, "little") + prompt.tobytes() + response.tobytes()
            self.hashes.extend((_hash(whole), _hash(response.tobytes())))
            self.tokens.extend(prompt)
            self.tokens.extend(response)

    def encoded(
        self, rows_read: int, left_out: int, dropped: dict[str, Dropped], notes: Sequence[str] = ()
    ) -> EncodedRows:
        return EncodedRows(
            np.array(self.tokens, np.int32),
            np.array(self.rows, np.int64).reshape(-1, 4),
            np.array(self.hashes, np.uint64).reshape(-1, 2),
            np.array(self.origins, np.int64),
            np.array(self.prompts, np.uint64),
            rows_read,
            left_out,
            dropped,
            list(notes),
        )
