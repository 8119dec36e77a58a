"""Encoded sources on disk, so that one process encodes them and the others read.

A file lock does the waiting, never a process group: tokenising a large source takes longer than its timeouts. Pieces
are written as they come, and read through a memory map, so that memory does not grow with the number of rows.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from aligndistil.data.report import Dropped
from aligndistil.errors import UserError
from aligndistil.files import cache_root, replace_folder, start_folder

START, PROMPT_LENGTH, RESPONSE_LENGTH, FLAGS = range(4)
DESIRABLE, PROMPT_TRUNCATED, RESPONSE_TRUNCATED, SHIFTED = 1, 2, 4, 8
ROW_HASH, RESPONSE_HASH = range(2)
ARRAYS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "tokens": (np.int32, ()),
    "rows": (np.int64, (4,)),
    "hashes": (np.uint64, (2,)),
    "origins": (np.int64, ()),
    "prompts": (np.uint64, ()),
}
"""Of each array, what it holds and the shape of one entry."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
"""Errors of a disk that takes no more."""
_Kept = TypeVar("_Kept")


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The token ids of a source, or of a piece of it. R rows; E examples, each of R / E consecutive rows."""

    tokens: NDArray[np.int32]
    """Prompt and response of row 0, of row 1, ..."""
    rows: NDArray[np.int64]
    """(R, 4): START in tokens, PROMPT_LENGTH, RESPONSE_LENGTH, FLAGS."""
    hashes: NDArray[np.uint64]
    """(R, 2): ROW_HASH of the prompt's and the response's tokens, RESPONSE_HASH of the response's."""
    origins: NDArray[np.int64]
    """(E,) the number of the raw row each example came from, from 1."""
    prompts: NDArray[np.uint64]
    """(E,) hashes of the prompt's text, which are the same with every tokenizer."""
    rows_read: int = 0
    left_out: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """The examples that were dropped, by reason."""
    notes: list[str] = field(default_factory=list)
    """What the report says of the source beside counts."""


Pieces = Generator[EncodedRows, None, None]


def made_once(folder: Path, read: Callable[[], _Kept | None], write: Callable[[Path], None]) -> _Kept:
    """What `read` finds in a folder of the cache; where it finds nothing, one process makes it first.

    `write` is given the folder to write into. Raises UserError when the cache cannot be written.
    """
    if (kept := read()) is not None:
        return kept
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the data cache {cache} cannot be made ({error}); set HF_HOME") from error
    if not os.access(cache, os.W_OK):
        raise UserError(f"the data cache {cache} cannot be written; set HF_HOME")
    with FileLock(f"{folder}.lock"):
        if (kept := read()) is not None:
            return kept
        partial = start_folder(folder)
        try:
            write(partial)
            replace_folder(folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise UserError(
                    f"the data cache {cache} cannot be written ({error}); free space, or set HF_HOME"
                ) from error
            raise
        kept = read()
        assert kept is not None
        return kept


def cached(key: str, encode: Callable[[], Pieces]) -> EncodedRows:
    """What is stored under the key; the pieces that `encode` makes are stored when it is not there, by one process.

    Raises UserError when the cache folder cannot be written.
    """
    folder = cache_root() / "data" / key

    def write(partial: Path) -> None:
        with closing(encode()) as pieces:  # what makes them may be processes, which end with it
            _write(partial, pieces)

    return made_once(folder, lambda: _read(folder), write)


def _read(folder: Path) -> EncodedRows | None:
    """None also when the files are not whole, as after a power cut."""
    if not (folder / "about.json").is_file():
        return None
    paths = {name: folder / f"{name}.npy" for name in ARRAYS}
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if [path.stat().st_size if path.exists() else 0 for path in paths.values()] != about.pop("bytes"):
            return None
        dropped = {reason: Dropped(**counted) for reason, counted in about.pop("dropped").items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    loaded = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    return EncodedRows(**loaded, **about, dropped=dropped)


def _write(folder: Path, pieces: Pieces) -> None:
    rows_read = left_out = 0
    dropped: dict[str, Dropped] = {}
    notes: list[str] = []
    with ExitStack() as stack:
        files = {name: stack.enter_context(_GrowingArray(folder / f"{name}.npy", *ARRAYS[name])) for name in ARRAYS}
        for piece in pieces:
            rows = piece.rows.copy()
            rows[:, START] += files["tokens"].length
            for name, file in files.items():
                file.append(rows if name == "rows" else getattr(piece, name))
            rows_read, left_out = rows_read + piece.rows_read, left_out + piece.left_out
            for reason, counted in piece.dropped.items():
                dropped.setdefault(reason, Dropped()).merge(counted)
            notes += piece.notes
    about = {
        "bytes": [(folder / f"{name}.npy").stat().st_size for name in ARRAYS],
        "rows_read": rows_read,
        "left_out": left_out,
        "dropped": {reason: {"count": counted.count, "rows": counted.rows} for reason, counted in dropped.items()},
        "notes": notes,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


class _GrowingArray:
    """A .npy file whose first axis grows. numpy leaves room in the header for the length, which is written last."""

    def __init__(self, path: Path, dtype: type[np.generic], entry: tuple[int, ...]) -> None:
        self._file, self._dtype, self._entry = path.open("wb"), np.dtype(dtype), entry
        self.length = 0
        self._write_header()

    def __enter__(self) -> _GrowingArray:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, entries: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(entries, self._dtype).data)
        self.length += len(entries)

    def _write_header(self) -> None:
        shape = (self.length, *self._entry)
        content = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, content)
