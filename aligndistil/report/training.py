"""What the training of one model took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from aligndistil.artefacts import Done

SPEED, MEMORY = "perf/tokens_per_second", "perf/peak_memory_gib"


def training_metrics(done: Done | None, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Steps and seconds of done.json; median tokens/s and largest peak memory of the training lines of metrics.jsonl.

    The median, because the first step of a stage warms up.
    """
    speeds = [line[SPEED] for line in lines if line["split"] == "train" and SPEED in line]
    peaks = [line[MEMORY] for line in lines if line["split"] == "train" and MEMORY in line]
    found = {} if done is None else {"steps": float(done.step), "seconds": done.seconds}
    found |= {"tokens_per_second": statistics.median(speeds)} if speeds else {}
    return found | ({"peak_memory_gib": max(peaks)} if peaks else {})
