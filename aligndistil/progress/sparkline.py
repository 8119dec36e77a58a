"""The course of one metric, kept in little memory and drawn on one line."""

from __future__ import annotations

import math

MOST_POINTS = 512
BLOCKS = "▁▂▃▄▅▆▇█"


class Course:
    """The values of a metric in the order of their steps; of a long training, means of equal stretches of steps."""

    def __init__(self) -> None:
        self.last = math.nan
        self._stretch = 1
        """Steps that one mean is of."""
        self._sums: dict[int, tuple[float, int]] = {}
        """Sum and number of the values in a stretch."""

    def add(self, step: int, value: float) -> None:
        """A value that is not finite is not drawn."""
        self.last = value
        if not math.isfinite(value):
            return
        self._put(step // self._stretch, value, 1)
        if len(self._sums) > MOST_POINTS:
            finer, self._sums = self._sums, {}
            self._stretch *= 2
            for place, (total, number) in finer.items():
                self._put(place // 2, total, number)

    def _put(self, place: int, total: float, number: int) -> None:
        before, count = self._sums.get(place, (0.0, 0))
        self._sums[place] = (before + total, count + number)

    def sparkline(self, width: int) -> str:
        """From the first step to the last, at most `width` characters: the lowest block is the lowest mean.

        A stretch without a value is as high as the one before.
        """
        if not self._sums or width < 1:
            return ""
        first = next(iter(self._sums))
        stretches = next(reversed(self._sums)) - first + 1
        columns: list[list[float]] = [[] for _ in range(min(width, stretches))]
        for place, (total, number) in self._sums.items():
            columns[(place - first) * len(columns) // stretches].append(total / number)
        heights: list[float] = []
        for means in columns:
            heights.append(sum(means) / len(means) if means else heights[-1])
        low, high = min(heights), max(heights)
        if low == high:
            return BLOCKS[3] * len(heights)
        return "".join(BLOCKS[round((one - low) / (high - low) * (len(BLOCKS) - 1))] for one in heights)
