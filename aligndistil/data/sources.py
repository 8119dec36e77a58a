"""Where raw rows come from: `builtin:reviews`, local files, or a data set of the Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from datasets import Dataset, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, whichever it uses

from aligndistil.data.local_files import NO_SPLIT, LocalFiles, find_local, near, refuse_twins
from aligndistil.data.row_store import file_hash, stored_rows
from aligndistil.errors import ServiceError, UserError
from aligndistil.recipe import Source

BUILTIN = "builtin:"
UNREADABLE = (DatasetsError, ValueError, OSError, EOFError, StopIteration)
"""What `datasets` raises on files it cannot parse, and on splits it does not find."""


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file, and how many rows of a source are from it."""

    name: str
    """Relative to the folder that the source names; for a data set of the Hub, its id and split."""
    rows: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A source that was read."""

    rows: Dataset
    """The raw rows, in file order."""
    files: list[FileRead]
    """Where they are from, in the order in which they are read."""
    content: str
    """SHA-256 of what they were read from, all splits of it: the same on any machine, on- or offline."""
    skipped: list[str] = field(default_factory=list)
    """What lies beside it and is of no split: `notes.txt (reason)`."""


def open_source(source: Source) -> Opened:
    """The raw rows of a source, the first `limit` of them, and what is known of them.

    A path that is one file, or a pattern, has one split, "train" (slices such as "train[:100]" work). In a folder the
    names say which split a file is, as `datasets` reads them: `train*.jsonl`, `test/*.jsonl`.

    Raises:
        UserError: nothing of that name, an unknown split, or files that cannot be parsed.
        ServiceError: the Hub cannot be reached, or failed.
    """
    skipped: list[str] = []
    if source.path.startswith(BUILTIN):
        rows, content = _load_builtin(source), content_hash(source)
        read = [FileRead(f"{source.path}, {source.split}", len(rows))]
    elif (local := find_local(source)) is not None:
        hashes = _file_hashes(local)
        rows, read = _load_local(source, local, hashes)
        content, skipped = _hash_local(local, hashes), local.skipped
    else:
        rows = _load_hub(source)
        read, content = [FileRead(f"{source.path}, {source.split}", len(rows))], _hash_arrow(rows)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
        read = _first(read, source.limit)
    if len(rows) == 0:
        raise UserError(f"data source {source.path}, split {source.split}: there is no row in it; give another")
    return Opened(rows, read, content, skipped)


def load_rows(source: Source) -> Dataset:
    """The rows of `open_source`. It raises the same."""
    return open_source(source).rows


def content_hash(source: Source) -> str:
    """The `content` of `open_source`, where local files are read and not parsed. It raises the same.

    Columns and limit are not part of it, nor is the split.
    """
    if source.path.startswith(BUILTIN):
        builtin = _builtin_file(source)
        return _hash([("train", builtin.name, hashlib.sha256(builtin.read_bytes()).hexdigest())])
    if (local := find_local(source)) is not None:
        return _hash_local(local, _file_hashes(local))
    return _hash_arrow(_load_hub(source))


def _file_hashes(local: LocalFiles) -> dict[Path, str]:
    return {file: file_hash(file) for of_split in local.splits.values() for file in of_split}


def _hash_local(local: LocalFiles, hashes: Mapping[Path, str]) -> str:
    """Splits, names and order count as well as what the files hold: they say which rows are read, and when."""
    return _hash(
        (split, local.name(file), hashes[file]) for split, of_split in local.splits.items() for file in of_split
    )


def _hash_arrow(rows: Dataset) -> str:
    arrow = sorted({Path(file["filename"]) for file in rows.cache_files})
    return _hash(("", file.name, file_hash(file)) for file in arrow)


def _hash(contents: Iterable[tuple[str, ...]]) -> str:
    return hashlib.sha256(json.dumps(list(contents)).encode()).hexdigest()


def _load_builtin(source: Source) -> Dataset:
    with _builtin_file(source).open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


def _builtin_file(source: Source) -> Traversable:
    folder = files("aligndistil") / "assets" / source.path.removeprefix(BUILTIN)
    ending = ".jsonl.gz"
    splits = sorted(file.name.removesuffix(ending) for file in folder.iterdir()) if folder.is_dir() else []
    if not (folder / f"train{ending}").is_file():
        raise UserError(f"data source {source.path}: the package has no such data; it has builtin:reviews")
    if source.split not in splits:
        raise UserError(f"data source {source.path}: no split {source.split}; it has {', '.join(splits)}")
    return folder / f"{source.split}{ending}"


def _load_local(source: Source, local: LocalFiles, hashes: Mapping[Path, str]) -> tuple[Dataset, list[FileRead]]:
    asked = "+".join(local.splits) if source.split == "all" else source.split
    where = f"data source {source.path}, split {source.split}"
    splits = list(dict.fromkeys(part.split("[")[0].strip() for part in asked.split("+")))
    for split in splits:
        if split not in local.splits:
            of_none = [line for line in local.skipped if line.endswith(f"({NO_SPLIT})")]
            rest = f" (of no split: {', '.join(line.split(' (')[0] for line in of_none[:3])})" if of_none else ""
            raise UserError(f"{where}: there is no split {split}; it has {', '.join(local.splits)}{rest}")
    in_order = [file for split in splits for file in local.splits[split]]
    if local.saved:
        rows, counts = _load_saved([local.saved[split] for split in splits], in_order, where)
    else:
        refuse_twins(source, local, in_order)
        rows, counts = stored_rows(in_order, [hashes[file] for file in in_order])
    pieces = _pieces(asked, {split: len(local.splits[split]) for split in splits}, counts, where)
    # Of a file without rows the count is said; one that a slice leaves out is not read.
    names, ends = [local.name(file) for file in in_order], [sum(counts[: place + 1]) for place in range(len(counts))]
    read = [
        FileRead(name, part)
        for piece in pieces
        for name, count, end in zip(names, counts, ends, strict=True)
        if (part := max(0, min(piece.stop, end) - max(piece.start, end - count))) or not count
    ]
    parts = [rows.select(piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts), read


def _pieces(asked: str, files_each: dict[str, int], counts: Sequence[int], where: str) -> list[range]:
    """Which of the rows of all splits together `train[:10%]+test` asks for."""
    rows: dict[str, int] = {}
    starts: dict[str, int] = {}
    at = iter(counts)
    for split, count in files_each.items():
        starts[split] = sum(rows.values())
        rows[split] = sum(next(at) for _ in range(count))
    try:
        pieces = ReadInstruction.from_spec(asked).to_absolute(rows)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{where}: {error}; write it as train[:100], train[:10%] or train+test") from error
    found = []
    for piece in pieces:
        within = range(rows[piece.splitname])[piece.from_ : piece.to]  # a slice may ask for more than there is
        start = starts[piece.splitname]
        found.append(range(start + within.start, start + within.stop) if within else range(0))
    return found


def _load_saved(folders: Sequence[Path], arrow: Sequence[Path], where: str) -> tuple[Dataset, list[int]]:
    """What `save_to_disk` wrote, memory-mapped where it lies, whatever format or columns were set when it was saved."""
    try:
        rows = concatenate_datasets([load_from_disk(str(folder)).with_format(None) for folder in folders])
        return rows, [len(Dataset.from_file(str(file))) for file in arrow]
    except UNREADABLE as error:
        raise UserError(f"{where}: cannot be read: {_reason(error)}") from error


def _first(read: Sequence[FileRead], limit: int) -> list[FileRead]:
    """The files that the first `limit` rows are from."""
    first: list[FileRead] = []
    for file in read:
        if limit > 0:
            first.append(FileRead(file.name, min(file.rows, limit)))
        limit -= file.rows
    return first


def _load_hub(source: Source) -> Dataset:
    named = f"data source {source.path}"
    try:
        # Memory-mapped whatever the configuration says: `content_hash` reads the Arrow files.
        return load_dataset(
            source.path, name=source.name, split=source.split, revision=source.revision, keep_in_memory=False
        )
    except DatasetNotFoundError as error:
        nearby = near(Path(source.path))
        raise UserError(f"{named}: neither a local path nor on the Hub{nearby}: {_reason(error)}") from error
    except (ConnectionError, TimeoutError, HTTPError) as error:
        remedy = "give a local path, or try again when the Hub can be reached"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            remedy = "HF_HUB_OFFLINE is set and it is not in the cache: unset it, or give a local path"
        raise ServiceError(f"{named}: nothing is at this path, and the Hub: {_reason(error)}; {remedy}") from error
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(f"{named}, split {source.split}: cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line that says something: `datasets` hides the cause of a failed parse one level down."""
    text = str(error.__cause__ or error).strip() or str(error).strip()
    return text.splitlines()[0] if text else "it holds no row"
