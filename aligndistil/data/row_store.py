"""The rows of local files on disk, memory-mapped, under a hash of what the files hold.

Not of where they lie or when they were written: a file that was rewritten, moved, or is another behind the same link is
read anew, and one that was only touched is not.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json, Value

from aligndistil.data.cache import made_once
from aligndistil.data.local_files import compression_of, format_of
from aligndistil.data.row_files import Column, read_batches
from aligndistil.errors import UserError
from aligndistil.files import cache_root

STORE_VERSION = 1
"""Raised whenever the same files give other rows, so that what is stored is not read."""
NULL = Value("null")


def stored_rows(files: Sequence[Path], hashes: Sequence[str]) -> tuple[Dataset, list[int]]:
    """The rows of all files, in order, and how many each has. A column that a file has not is null in its rows.

    `hashes` are the files' `file_hash`: the rows are those of that content, whatever becomes of the files.

    Raises UserError when a file cannot be read, has changed since it was hashed, or the cache cannot be written.
    """
    read_as = [[format_of(file), compression_of(file), of_file] for file, of_file in zip(files, hashes, strict=True)]
    key = hashlib.sha256(json.dumps([STORE_VERSION, read_as]).encode()).hexdigest()
    folder = cache_root() / "rows" / key

    def write(partial: Path) -> None:
        _write(partial, files)
        for file, before in zip(files, hashes, strict=True):
            if file_hash(file) != before:
                raise UserError(f"data source {file}: it changed while it was read; start again when it is whole")

    return made_once(folder, lambda: _read(folder), write)


def file_hash(file: Path) -> str:
    """SHA-256 of the content. Raises UserError when it cannot be read."""
    try:
        state = file.stat()
        # The time of the last change of the inode cannot be set by hand, as that of the content can.
        return _hash_of(file, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except OSError as error:
        raise UserError(f"data source {file}: cannot be read: {error.strerror}") from error


@functools.cache
def _hash_of(file: Path, *state: int) -> str:
    """Once a process for each state of a file: a large one takes minutes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass
class _AsWritten(Json):  # type: ignore[misc]  # datasets has no types
    """`Json` decoded by the standard library: that of `datasets` rounds numbers, and fails on large ones."""

    def decode_example(self, example_data: Any, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


def _read(folder: Path) -> tuple[Dataset, list[int]] | None:
    """None also when the file is not whole, as after a power cut."""
    about, rows = folder / "about.json", folder / "rows.arrow"
    if not about.is_file() or not rows.is_file():
        return None
    try:
        stored = json.loads(about.read_text(encoding="utf-8"))
        whole, counts = rows.stat().st_size == stored["bytes"], list(stored["rows"])
    except (ValueError, KeyError, TypeError):
        return None
    return (_load(folder), counts) if whole else None


def _load(folder: Path) -> Dataset:
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    as_written = {name: _AsWritten() if isinstance(kind, Json) else kind for name, kind in rows.features.items()}
    rows.info.features = Features(as_written)
    return rows


def _write(folder: Path, files: Sequence[Path]) -> None:
    """Rows in a file for each of `files`. What a column's type is, is known when all rows have been seen: those of the
    first batch are tried, and only if they did not do is everything read again.
    """
    path = folder / "rows.arrow"
    columns = _merge({}, next((batch for file in files for _, batch in read_batches(file)), {}))
    while True:
        counts, seen = _write_as(path, columns, files)
        if seen == columns:
            break
        columns = seen
    if any(counts) and not columns:
        raise UserError(f"data source {files[0]}: its rows are empty; give another")
    about = {"bytes": path.stat().st_size, "rows": counts}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _write_as(path: Path, columns: dict[str, Any], files: Sequence[Path]) -> tuple[list[int], dict[str, Any]]:
    """Write the rows in columns of these types, for as long as they fit. The rows of each file, and the types seen."""
    seen, counts = columns, []
    schema = Features(columns).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for source in files:
            counts.append(0)
            for rows, batch in read_batches(source):
                seen = _merge(seen, batch)
                if seen == columns:
                    where = f"data source {source}, rows {counts[-1] + 1} to {counts[-1] + rows}"
                    arrays = [
                        _array(batch.get(field.name), columns[field.name], field, rows, where) for field in schema
                    ]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                counts[-1] += rows
    return counts, seen


def _merge(columns: Mapping[str, Any], batch: Mapping[str, Column]) -> dict[str, Any]:
    """Types that hold both: where they differ, each value is kept as it is written."""
    merged = dict(columns)
    for name, column in batch.items():
        known = merged.get(name, NULL)
        if known != column.feature and column.feature != NULL:
            merged[name] = column.feature if known == NULL else Json()
        else:
            merged[name] = known
    return merged


def _array(column: Column | None, feature: Any, field: pa.Field, rows: int, where: str) -> pa.Array:
    if column is None or column.feature == NULL:
        return pa.nulls(rows, field.type)
    values = column.values
    if isinstance(values, pa.ChunkedArray) and column.feature == feature:
        return values
    listed = values if isinstance(values, list) else values.to_pylist()
    try:
        if not isinstance(feature, Json):
            return pa.array(listed, field.type)
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in listed]
        return pa.ExtensionArray.from_storage(field.type, pa.array(texts, field.type.storage_type))
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.start]
        raise UserError(
            f"{where}, column {field.name}: half of a surrogate pair (\\ud...) after {near!r} is not text; "
            "write the whole character"
        ) from error
    except TypeError as error:
        raise UserError(
            f"{where}, column {field.name}: its type, {column.feature}, is not that of other files, and "
            "JSON cannot hold it; convert it, or leave the column out"
        ) from error
