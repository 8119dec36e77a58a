"""A training goes on when what it prints can be read by nobody: no terminal, `| head` has ended, the disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def console_may_be_lost() -> Iterator[None]:
    """What is written to standard output and error once they fail goes nowhere. What matters is in the run folder."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        # A stream that was closed before the start, with `>&-`, is None.
        sys.stdout, sys.stderr = (_Lossy(stream or nowhere) for stream in before)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


class _Lossy:
    """A text stream whose file is exchanged for the null device when it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        # Under the stream, so that what it holds back, and what the interpreter flushes at its end, goes there too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
