"""No tracker stops a training: metrics.jsonl is the truth, and a server that is away is asked again later."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from aligndistil.errors import ServiceError
from aligndistil.run_folder.trackers.base import Tracker

logger = logging.getLogger(__name__)

AGAIN_AFTER = 300.0
"""Seconds until a tracker that failed is tried again."""
KEPT = 20_000
"""Lines that wait for a tracker; older ones are only in metrics.jsonl."""


class Guarded:
    """Opens a tracker and hands it the lines that wait, again later when it fails. Says once that it failed."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], clock: Callable[[], float] = time.monotonic):
        """Opens the tracker. Raises what `open_tracker` does, apart from OSError and ServiceError."""
        self.name = name
        self._open = open_tracker
        self._clock = clock
        self._tracker: Tracker | None = None
        self._waiting: deque[tuple[int, str, Mapping[str, float]]] = deque(maxlen=KEPT)
        self._next_try = -math.inf
        self._said = False
        self._deliver()

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._waiting.append((step, split, dict(metrics)))
        if self._clock() >= self._next_try:
            self._deliver()

    def close(self) -> None:
        """A last attempt to deliver what waits."""
        self._deliver()
        if self._waiting:
            logger.warning("%s: it never got %d lines of metrics.jsonl", self.name, len(self._waiting))
        if self._tracker is not None:
            try:
                self._tracker.close()
            except (OSError, ServiceError) as error:
                self._say(error)

    def _deliver(self) -> None:
        try:
            if self._tracker is None:
                self._tracker = self._open()
            while self._waiting:
                self._tracker.log(*self._waiting[0])
                self._waiting.popleft()
        except (OSError, ServiceError) as error:
            self._next_try = self._clock() + AGAIN_AFTER
            self._say(error)

    def _say(self, error: Exception) -> None:
        if not self._said:
            what = str(error).strip().partition("\n")[0]
            logger.warning("%s: %s; training goes on, and metrics.jsonl has every value", self.name, what)
        self._said = True
