"""Signals that ask a command to stop, and a process that ends with the one that started it.

SIGTERM, SIGHUP and SIGUSR1 (the warning that SLURM sends ahead of the end) all ask for the same; so does Ctrl-C, which
asked for twice leaves at once. Where something can be saved, the request waits for it; elsewhere it is an Interrupted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from aligndistil.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

ASKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PARENT = "ALIGNDISTIL_PARENT"
"""The process that started this one; it is set in those that a command starts."""
_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Whether a stop was asked for, while `deferred`."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = EXIT_SIGTERM
        """What the command ends with because of it."""

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Notes the request, for whoever asks for it; a second Ctrl-C is a KeyboardInterrupt."""
        with handled({**dict.fromkeys(ASKS, self._note), signal.SIGINT: self._note}):
            yield

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            self.exit_code = EXIT_SIGINT
        first, self.requested = not self.requested, True
        if first and os.environ.get("RANK", "0") == "0":
            # Not through a file object: the signal may have come in the middle of a write to it. And the terminal may
            # be what has gone.
            with suppress(OSError):
                os.write(2, b"stopping: the step that runs is finished and saved first; Ctrl-C now leaves at once\n")


@contextmanager
def interrupted(sentence: str) -> Iterator[None]:
    """A request to stop raises Interrupted with this sentence, wherever the process is."""

    def stop(number: int, frame: Any) -> None:
        raise _Stop

    try:
        with handled(dict.fromkeys(ASKS, stop)):
            yield
    except _Stop:
        raise Interrupted(sentence) from None


class _Stop(BaseException):
    """No Exception: somebody's `except Exception` would lose the request."""


@contextmanager
def handled(handlers: Mapping[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    """Signals are given to these handlers, and to those from before at the end. In the main thread only.

    One that is ignored stays so: `nohup` asks for that.
    """
    taken = {one: handler for one, handler in handlers.items() if signal.getsignal(one) is not signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Be sent SIGTERM when the process that started this one ends, however it ends. On Linux only."""
    parent = os.environ.pop(PARENT, None)  # what this process starts has another
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has ended before this line
        raise Interrupted("the process that started this one has ended")
