"""The course of one metric, drawn on one line."""

from __future__ import annotations

import math
from array import array

import numpy as np

BLOCKS = "▁▂▃▄▅▆▇█"


class Course:
    """The values of a metric in the order of their steps."""

    def __init__(self) -> None:
        self.last = math.nan
        self._steps, self._values = array("q"), array("d")  # 16 bytes a step, however long the training

    def add(self, step: int, value: float) -> None:
        """A value that is not finite is not drawn."""
        self.last = value
        if math.isfinite(value):
            self._steps.append(step)
            self._values.append(value)

    def sparkline(self, width: int) -> str:
        """From the first step to the last, at most `width` characters, each the mean of as many steps.

        The lowest block is the lowest mean. Steps without a value are as high as those before.
        """
        if not self._steps or width < 1:
            return ""
        steps = np.array(self._steps) - self._steps[0]
        columns = min(width, int(steps[-1]) + 1)
        places = steps * columns // (steps[-1] + 1)
        number = np.bincount(places, minlength=columns)
        total = np.bincount(places, np.array(self._values), columns)
        drawn = number > 0
        means = (total[drawn] / number[drawn])[drawn.cumsum() - 1]
        low, high = means.min(), means.max()
        if low == high:
            return BLOCKS[3] * columns
        heights = (means - low) / (high - low) * (len(BLOCKS) - 1)
        return "".join(BLOCKS[height] for height in heights.round().astype(int))
