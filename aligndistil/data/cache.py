"""Encoded sources on disk, so that one process encodes them and the others read.

A file lock does the waiting, never a process group: tokenising a large source takes longer than its timeouts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from aligndistil.errors import UserError
from aligndistil.files import cache_root, replace_folder, start_folder

START, PROMPT_LENGTH, RESPONSE_LENGTH, FLAGS = range(4)
DESIRABLE, PROMPT_TRUNCATED, RESPONSE_TRUNCATED, SHIFTED = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The token ids of a source, in three flat arrays. R rows; E examples, each of R / E consecutive rows."""

    tokens: NDArray[np.int32]
    """Prompt and response of row 0, of row 1, ..."""
    rows: NDArray[np.int64]
    """(R, 4): START in tokens, PROMPT_LENGTH, RESPONSE_LENGTH, FLAGS."""
    origins: NDArray[np.int64]
    """(E,) the number of the raw row each example came from, from 1."""
    rows_read: int
    left_out: int
    dropped: list[tuple[str, int]]
    """Reason and raw row number, one for each example that was dropped."""


def cached(key: str, encode: Callable[[], EncodedRows]) -> EncodedRows:
    """What is stored under the key; `encode` makes and stores it when it is not there, in one process at a time.

    Raises UserError when the cache folder cannot be written.
    """
    folder = cache_root() / "data" / key
    if (stored := _read(folder)) is not None:
        return stored
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the data cache {folder.parent} cannot be made ({error}); set HF_HOME") from error
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"the data cache {folder.parent} cannot be written; set HF_HOME")
    with FileLock(f"{folder}.lock"):
        return _read(folder) or _write(folder, encode())


def _read(folder: Path) -> EncodedRows | None:
    """None also when the files are not whole, as after a power cut."""
    if not (folder / "about.json").is_file():
        return None
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    arrays = {name: folder / f"{name}.npy" for name in ("tokens", "rows", "origins")}
    if [path.stat().st_size if path.exists() else 0 for path in arrays.values()] != about.pop("bytes"):
        return None
    loaded = {name: np.load(path, mmap_mode="r") for name, path in arrays.items()}
    return EncodedRows(**loaded, **about)


def _write(folder: Path, encoded: EncodedRows) -> EncodedRows:
    partial = start_folder(folder)
    arrays = {name: partial / f"{name}.npy" for name in ("tokens", "rows", "origins")}
    for name, path in arrays.items():
        np.save(path, getattr(encoded, name))
    about = {
        "bytes": [path.stat().st_size for path in arrays.values()],
        "rows_read": encoded.rows_read,
        "left_out": encoded.left_out,
        "dropped": encoded.dropped,
    }
    (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
    replace_folder(folder)
    return encoded
