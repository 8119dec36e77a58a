"""SIGTERM asks a run to stop: after the step batch that it is in, with a checkpoint, or after the stage."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """`requested` is true once SIGTERM has arrived. A context manager."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
