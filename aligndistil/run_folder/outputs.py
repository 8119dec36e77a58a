"""Whether `--out` can be written, asked before the work that would fill it."""

from __future__ import annotations

import os
from pathlib import Path

from aligndistil.errors import UserError


def check_file(path: Path) -> None:
    """Make the folder of a file to write. Raises UserError when the file could not be written there."""
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; give the name of a file")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Make a folder to write into. Raises UserError when that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out: {path} is no folder, or lies below something that is none; give another") from None
    except OSError as error:
        raise UserError(f"--out: {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out: {path} cannot be written to; give another")
