"""metrics.jsonl: one JSON object a line, the truth that trackers, tables and plots are made from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from aligndistil.errors import UserError
from aligndistil.files import write_bytes
from aligndistil.run_folder.trackers import Tracker

OWN_KEYS = frozenset({"step", "split", "not_finite"})


class MetricsLog:
    """The metrics of one stage. The file is opened for each line, so an object that only reads costs nothing."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path = path
        self.trackers = list(trackers)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one line and hand it to the trackers.

        JSON has no NaN and no infinity: such values are left out, and named under `not_finite`.
        Raises ValueError when a metric has the name of a field of the line itself.
        """
        if taken := OWN_KEYS & metrics.keys():
            raise ValueError(f"{sorted(taken)} are fields of the line, not metrics")
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step, "split": split, **finite}
        if missing := [name for name in metrics if name not in finite]:
            line["not_finite"] = missing
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                # A process killed in the middle of a line would otherwise spoil the next one too.
                file.truncate(len(self._complete()))
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        for tracker in self.trackers:
            tracker.log(step, split, finite)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a torn last one is ignored. Empty when there is no file.

        Raises UserError when a line is none that `log` wrote.
        """
        return [self._parsed(number, line) for number, line in enumerate(self._complete().splitlines(), 1)]

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`, and a torn last line: a resumed run logs it again. Raises as `read`."""
        if self.path.exists():
            lines = zip(self.read(), self._complete().splitlines(keepends=True), strict=True)
            write_bytes(self.path, b"".join(written for line, written in lines if line["step"] <= step))

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parsed(self, number: int, written: bytes) -> dict[str, Any]:
        try:
            line = json.loads(written)
            whole = isinstance(line["step"], int) and isinstance(line["split"], str)
            whole &= all(isinstance(line[name], int | float) for name in line.keys() - OWN_KEYS)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"{self.path}:{number}: this line is none that aligndistil writes; remove it to go on")
        return cast(dict[str, Any], line)

    def _complete(self) -> bytes:
        """The file up to and with its last line end."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]
