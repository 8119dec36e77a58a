"""The course of one metric, kept in little memory and drawn with braille dots."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

MOST_POINTS = 1024
ACROSS, DOWN = 2, 4
"""Dots of a braille character."""
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of the dot in column i, row j from the top."""
BLANK = 0x2800


class Curve:
    """Steps and values; where there are many, as many neighbours as needed are averaged, all along the curve."""

    def __init__(self) -> None:
        self._averaged = 1
        self._means: list[tuple[float, float]] = []
        self._new: list[tuple[float, float]] = []

    def add(self, step: float, value: float) -> None:
        """Steps come in order; a value that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._new.append((step, value))
        if len(self._new) == self._averaged:
            self._means.append(_mean(self._new))
            self._new = []
        if len(self._means) == MOST_POINTS:
            self._means = [_mean(self._means[i : i + 2]) for i in range(0, MOST_POINTS, 2)]
            self._averaged *= 2

    @property
    def _points(self) -> list[tuple[float, float]]:
        return [*self._means, _mean(self._new)] if self._new else self._means

    @property
    def steps(self) -> tuple[float, float] | None:
        """The first and the last step; None without values."""
        points = self._points
        return (points[0][0], (self._new or points)[-1][0]) if points else None

    def draw(self, width: int, height: int) -> tuple[list[str], float, float] | None:
        """`height` lines of `width` characters from the first step to the last, and the values of bottom and top.

        Each column of dots is the mean of its stretch of steps. None without values.
        """
        points = self._points
        if not points:
            return None
        heights = columns(points, width * ACROSS)
        low, high = min(heights), max(heights)
        rows = height * DOWN
        scale = (rows - 1) / (high - low) if high > low else 0.0
        levels = [rows // 2 if not scale else round((high - value) * scale) for value in heights]
        return dots(levels, width, height), low, high


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def columns(points: Sequence[tuple[float, float]], count: int) -> list[float]:
    """Means of `count` equal stretches of steps; a stretch without a point lies on the line between its neighbours."""
    first, last = points[0][0], points[-1][0]
    stretch = (last - first) / count or 1.0
    sums, numbers = [0.0] * count, [0] * count
    for step, value in points:
        place = min(count - 1, int((step - first) / stretch))
        sums[place] += value
        numbers[place] += 1
    known = [i for i in range(count) if numbers[i]]
    means = {i: sums[i] / numbers[i] for i in known}
    return [means[i] if i in means else _between(i, known, means) for i in range(count)]


def _between(place: int, known: Sequence[int], means: dict[int, float]) -> float:
    right = bisect_left(known, place)
    if right == len(known):  # one point: a level line
        return means[known[-1]]
    before, after = known[right - 1], known[right]
    share = (place - before) / (after - before)
    return means[before] * (1 - share) + means[after] * share


def dots(levels: Sequence[int], width: int, height: int) -> list[str]:
    """A connected line through `levels` (rows of dots from the top, one a column of dots)."""
    cells = [[BLANK] * width for _ in range(height)]
    previous = levels[0]
    for column, level in enumerate(levels):
        # From beside the previous dot, so that a steep rise has no holes.
        start = level if level == previous else previous + (1 if level > previous else -1)
        for row in range(min(start, level), max(start, level) + 1):
            cells[row // DOWN][column // ACROSS] |= DOTS[column % ACROSS][row % DOWN]
        previous = level
    return ["".join(map(chr, line)) for line in cells]
