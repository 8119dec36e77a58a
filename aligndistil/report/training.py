"""What the training of one model took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligndistil.run_folder import Done

TOKENS, SECONDS, MEMORY = "num_tokens", "perf/step_seconds", "perf/peak_memory_gib"


def training_metrics(done: Done | None, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Steps and seconds of done.json; tokens/s and largest peak memory of the training lines of metrics.jsonl.

    Tokens/s are all tokens over all seconds of steps, rollouts included: where several steps share a rollout, the
    speed of a typical step says nothing of it.
    """
    trained = [line for line in lines if line["split"] == "train"]
    peaks = [line[MEMORY] for line in trained if MEMORY in line]
    found = {} if done is None else {"steps": float(done.step), "seconds": done.seconds}
    found |= {"tokens_per_second": speed} if (speed := _speed(trained)) else {}
    return found | ({"peak_memory_gib": max(peaks)} if peaks else {})


def _speed(trained: Sequence[Mapping[str, Any]]) -> float | None:
    timed = [line for line in trained if TOKENS in line and SECONDS in line]
    if not timed:
        return None
    # A log that is not of every step stands for the steps since its last line.
    steps = [line["step"] for line in timed]
    passed = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    seconds = sum(line[SECONDS] * n for line, n in zip(timed, passed, strict=True))
    return float(timed[-1][TOKENS] / seconds) if seconds else None
