"""A polite end: SIGTERM is a request that is honoured when the step, or the stage, is done."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Turns SIGTERM into a request that the loop honours after the step batch it is in. A context manager."""

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
