"""Moving averages, and how wide they are where nobody says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOWS = 12
"""By default a line averages over a twelfth of its curve, and a curve of fewer than 24 points is as it is."""


class Usual(NamedTuple):
    """How far a moving average looks to either side where no number of steps is asked for."""

    steps: float
    windows: int
    """How many such averages stand side by side in a curve of the usual length."""

    def on(self, steps: Array) -> float:
        """The same for all curves, but no wider than fits into its own, and no narrower than to the next point."""
        if self.steps == 0 or len(steps) < 2 * self.windows:
            return 0.0
        return max(min(self.steps, half_window(steps, self.windows)), float(np.median(np.diff(steps))))


def half_window(steps: Array, windows: int) -> float:
    """Half of one of so many windows that stand side by side in a curve."""
    return float((steps[-1] - steps[0]) // (2 * windows))


def moving_average(at: Array, values: Array, reach: float) -> Array:
    """Centred mean over the points within `reach` of each, `at` ascending (P,), values (..., P)."""
    first = np.searchsorted(at, at - reach, side="left")
    after = np.searchsorted(at, at + reach, side="right")
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    averaged: Array = (sums[..., after] - sums[..., first]) / (after - first)
    return np.where(after - first == 1, values, averaged)  # one point is itself, without rounding
