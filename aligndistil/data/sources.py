"""Where raw rows come from: `builtin:reviews`, a local file or folder, or a data set of the Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BufferedReader
from pathlib import Path
from typing import cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, whichever it uses

from aligndistil.errors import ServiceError, UserError, nearest
from aligndistil.recipe import Source

BUILTIN = "builtin:"
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""The ending of a local file, `.gz` apart, and the builder of `datasets` that reads it."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
UNREADABLE = (DatasetsError, ValueError, OSError, EOFError, StopIteration)
"""What `datasets` raises on files it cannot parse, and on splits it does not find."""


def load_rows(source: Source) -> Dataset:
    """The raw rows of a source, in file order, the first `limit` of them.

    A path that is one file has one split, "train" (slices such as "train[:100]" work); in a folder the file names say
    which split they are, as `datasets` reads them (`train*.jsonl`, `test*.jsonl`, `data/train-0000.parquet`).

    Raises:
        UserError: nothing of that name, an unknown split, or files that cannot be parsed.
        ServiceError: the Hub cannot be reached, or failed.
    """
    if source.path.startswith(BUILTIN):
        rows = _load_builtin(source)
    elif (path := local_path(source)) is not None:
        rows = _load_local(source, path)
    else:
        rows = _load_hub(source)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if len(rows) == 0:
        raise UserError(f"data source {source.path}, split {source.split}: there is no row in it; give another")
    return rows


def content_hash(source: Source) -> str:
    """SHA-256 of the files of a source; for a Hub id, of the Arrow files it was downloaded into.

    The same content has the same hash on any machine and on- or offline; split, columns and limit are not part of it.
    """
    if source.path.startswith(BUILTIN):
        return _hash([_builtin_file(source)])
    if (path := local_path(source)) is not None:
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return _hash([path] if path.is_file() else inside)
    rows = load_rows(source.model_copy(update={"limit": None}))
    return _hash(sorted({Path(file["filename"]) for file in rows.cache_files}))


def local_path(source: Source) -> Path | None:
    """The file or folder a source names, or None when it names a data set of the Hub.

    Raises UserError when the path can only be local and nothing is there.
    """
    path = Path(source.path).expanduser()
    if path.exists():
        return path
    looks_local = source.path.startswith((".", "/", "~")) or _builder(path) is not None
    if looks_local or not HUB_ID.fullmatch(source.path):
        raise UserError(f"data source {source.path}: there is no such file or folder{_nearest(path)}")
    return None


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


def _load_local(source: Source, path: Path) -> Dataset:
    builder = _builder(path)
    if path.is_file() and builder is None:
        raise UserError(f"data source {path}: its ending is none of {', '.join(BUILDERS)} (.gz may follow)")
    try:
        if builder is not None and path.is_file():
            return load_dataset(builder, data_files=str(path), split=source.split)
        return load_dataset(str(path), name=source.name, split=source.split)
    except UNREADABLE as error:
        raise UserError(f"data source {path}, split {source.split}: cannot be read: {_reason(error)}") from error


def _load_hub(source: Source) -> Dataset:
    named = f"data source {source.path}"
    try:
        # Memory-mapped whatever the configuration says: `content_hash` reads the Arrow files.
        return load_dataset(
            source.path, name=source.name, split=source.split, revision=source.revision, keep_in_memory=False
        )
    except DatasetNotFoundError as error:
        nearby = _nearest(Path(source.path))
        raise UserError(f"{named}: neither a local path nor on the Hub{nearby}: {_reason(error)}") from error
    except (ConnectionError, TimeoutError, HTTPError) as error:
        remedy = "give a local path, or try again when the Hub can be reached"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            remedy = "HF_HUB_OFFLINE is set and it is not in the cache: unset it, or give a local path"
        raise ServiceError(f"{named}: nothing is at this path, and the Hub: {_reason(error)}; {remedy}") from error
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(f"{named}, split {source.split}: cannot be read: {_reason(error)}") from error


def _builder(path: Path) -> str | None:
    return BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _reason(error: BaseException) -> str:
    """The first line that says something: `datasets` hides the cause of a failed parse one level down."""
    text = str(error.__cause__ or error).strip() or str(error).strip()
    return text.splitlines()[0] if text else "it holds no row"


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    near = nearest(path.name, sorted(entry.name for entry in folder.iterdir()), count=3, cutoff=0.5)
    return f"; near it: {', '.join(str(folder / name) for name in near)}" if near else ""


def _hash(contents: Iterable[Traversable]) -> str:
    """Names count as well as bytes: in a folder they say which split a file is."""
    whole = hashlib.sha256()
    for content in contents:
        with content.open("rb") as opened:
            whole.update(
                f"{content.name}\n{hashlib.file_digest(cast(BufferedReader, opened), 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest()
