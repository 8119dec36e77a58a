"""A file of rows, read a batch at a time: JSON, CSV or Parquet -> columns, each with the type that its values have.

Nothing is guessed: a value is what the file says. What is nested, or differs from row to row, is kept as it is written.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Json, Value
from datasets.table import table_cast

from aligndistil.data.local_files import compression_of, format_of
from aligndistil.errors import UserError

ROWS_AT_ONCE = 1000
BLOCK = 1 << 20
"""Characters of JSON read at once."""
LONGEST_TOKEN = 16
"""An error this near to the end of a block may be that the block ends there: no word of JSON is longer."""
SPACE = re.compile(r"[ \t\r\n]*")
INT64 = range(-(2**63), 2**63)
SCALARS = {str: Value("string"), bool: Value("bool"), int: Value("int64"), float: Value("float64")}

csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a batch."""

    feature: Any
    """Its type, a feature of `datasets`: null when no row has a value, Json when it is not one type of scalar."""
    values: list[Any] | pa.ChunkedArray


def read_batches(path: Path) -> Iterator[tuple[int, dict[str, Column]]]:
    """The rows of a file, in order: how many, and their columns.

    Raises UserError, with file and line, when it cannot be read.
    """
    kind = format_of(path)
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
            return
        rows = _read_json(path) if kind == "json" else _read_csv(path, "\t" if kind == "tsv" else ",")
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(name for row in batch for name in row)
            columns = {name: [row.get(name) for row in batch] for name in names}
            yield len(batch), {name: Column(_feature(values), values) for name, values in columns.items()}
    except UnicodeDecodeError:
        raise UserError(f"data source {path}, {_not_utf8(path)}; save the file as UTF-8") from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"data source {path}: cannot be read: {reason}") from error


def _open(path: Path) -> BinaryIO:
    """The file, unpacked."""
    packed = compression_of(path)
    if packed == ".zst":
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    openers: Mapping[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers[packed](path) if packed else path.open("rb"))


def _not_utf8(path: Path) -> str:
    """`line 3: byte 120 is not UTF-8`, the first such byte, counted from 0 as it is unpacked."""
    start = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: byte {start + error.start} is not UTF-8"
            start += len(line)
    return "its end is not UTF-8"


def _feature(values: list[Any]) -> Any:
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return Value("null")
    kind = kinds.pop()
    if kinds or kind not in SCALARS or (kind is int and not all(value in INT64 for value in values if value)):
        return Json()
    return SCALARS[kind]


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Column]]]:
    with _open(path) as file:
        parquet = pq.ParquetFile(io.BytesIO(file.read()) if compression_of(path) else file)
        names = parquet.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data source {path}: the column {twice[0]} is there twice; rename one")
        features = _features_of(path, parquet.schema_arrow)
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            table = table_cast(pa.Table.from_batches([batch]), features.arrow_schema)
            yield len(table), {name: Column(feature, table[name]) for name, feature in features.items()}


def _features_of(path: Path, schema: pa.Schema) -> Features:
    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException):
        for field in schema:
            try:
                Features.from_arrow_schema(pa.schema([field]))
            except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
                raise UserError(
                    f"data source {path}: the column {field.name} has the type {field.type}, which cannot be read; "
                    "convert it, or write the file without it"
                ) from error
        raise


def _read_csv(path: Path, separator: str) -> Iterator[dict[str, Any]]:
    """Every cell is text, "NA" and "007" too: who wants a number reads one. An empty cell is a missing value."""
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = [name or f"Unnamed: {place}" for place, name in enumerate(next(lines, []))]
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise UserError(f"data source {path}, line 1: the column {twice[0]} is there twice; rename one")
            for cells in lines:
                if not cells and len(header) > 1:
                    continue
                cells = cells or [""]  # of a file with one column, an empty line is an empty cell
                if len(cells) != len(header):
                    raise UserError(
                        f"data source {path}, line {lines.line_num}: {len(cells)} cells, but the header has "
                        f"{len(header)}; quote cells that hold a separator or a line break"
                    )
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise UserError(f"data source {path}, line {lines.line_num}: it cannot be parsed: {error}") from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Objects one after another, a line each or not, or the objects of one array; one at a time is held."""
    decode = json.JSONDecoder().raw_decode
    text, at, line, row = "", 0, 1, 0  # `line` is that of the beginning of `text`
    array, between, closed = False, False, False

    def wrong(reason: str) -> UserError:
        here = line + text.count("\n", 0, at)
        return UserError(f"data source {path}, line {here}: row {row + 1} {reason}")

    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n") as file:
        while True:
            at = cast(re.Match[str], SPACE.match(text, at)).end()
            if at == len(text):
                line += text.count("\n")
                text, at = file.read(BLOCK), 0
                if not text:
                    break
            elif closed:
                raise wrong("follows the end of the array; write one array, or one object a line")
            elif text[at] == "[" and row == 0 and not array:
                at, array = at + 1, True
            elif text[at] == "]" and array and (between or row == 0):
                at, closed = at + 1, True
            elif between and text[at] == ",":
                at, between = at + 1, False
            elif between:
                raise wrong("is not separated from the one before it by a comma")
            else:
                try:
                    value, end = decode(text, at)
                except json.JSONDecodeError as error:
                    may_go_on = error.msg.startswith("Unterminated") or error.pos > len(text) - LONGEST_TOKEN
                    more = file.read(max(BLOCK, len(text))) if may_go_on else ""
                    if not more:
                        raise wrong(f"is not JSON: {error.msg}, near {text[error.pos : error.pos + 20]!r}") from None
                    line += text.count("\n", 0, at)
                    text, at = text[at:] + more, 0
                    continue
                except RecursionError:
                    raise wrong("is nested too deeply") from None
                except ValueError:  # Python reads no longer ones
                    raise wrong("holds a whole number of more than 4,300 digits; write it as text") from None
                if not isinstance(value, dict):
                    raise wrong(f"is not an object with columns: {text[at : min(end, at + 20)]}")
                if odd := next((name for name in value if not _is_text(name)), None):
                    raise wrong(f"has a key with half of a surrogate pair, {odd!r}; write the whole character")
                yield value
                at, row, between = end, row + 1, array
        if array and not closed:
            raise wrong("is missing: the array does not end; the file is cut off")
