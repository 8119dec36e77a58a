"""Atomic writes: a file or folder is there whole or not at all; it is written under another name, then renamed.

And where this package keeps what it need not make or fetch again.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.(partial|aside)|(final|checkpoint-\d+)\.tmp")
"""Names of what is being written: `.NAME.partial`; the others are those of earlier versions."""


def cache_root() -> Path:
    """$HF_HOME/aligndistil, else $XDG_CACHE_HOME/aligndistil, else ~/.cache/aligndistil."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "aligndistil"
    return Path.home() / ".cache" / "aligndistil"


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete. The name is fixed, so that a second attempt replaces the first."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Whether `path` is what an interrupted write left behind."""
    return _PARTIAL.fullmatch(path.name) is not None


def remove_partial(folder: Path) -> None:
    """Remove what interrupted writes left in a folder, which need not exist, and nothing else."""
    for left in filter(is_partial, folder.iterdir() if folder.is_dir() else ()):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, UTF-8, in one step. Makes its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def start_folder(target: Path) -> Path:
    """An empty folder to write into, at `partial_path(target)`; `replace_folder` gives it the name of `target`."""
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(target: Path) -> None:
    """The complete folder at `partial_path(target)` takes the name of `target` and the place of what was there.

    It is on the disk before it is renamed: after a power cut, what has the name is whole.
    """
    partial = partial_path(target)
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder that a kill in the middle must not leave half there under its name."""
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
