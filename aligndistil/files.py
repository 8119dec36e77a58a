"""Files and folders that are there whole or not at all: written aside in the same folder, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ASIDE = ".aside"


def aside_of(path: Path) -> Path:
    """Where `path` is written until it is complete. The name is fixed, so that a second attempt replaces the first."""
    return path.with_name(f".{path.name}{ASIDE}")


def is_aside(path: Path) -> bool:
    """Whether `path` is what an interrupted write left behind."""
    return path.name.startswith(".") and path.name.endswith(ASIDE)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, UTF-8, in one step. Makes its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def settle(aside: Path, target: Path) -> None:
    """A complete folder takes the name of `target` and the place of what was there.

    It is on the disk before it is renamed: after a power cut, what has the name is whole.
    """
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
