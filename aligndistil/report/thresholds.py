"""How soon each method gets to the same value: the ratio that a claim of faster convergence is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from aligndistil.report.curves import Curve
from aligndistil.report.smoothing import Array

SHARE = 0.9
LONG = 0.5
"""A curve of fewer steps than this share of the longest has just begun."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Where one curve first reaches the threshold, in units of x."""

    label: str
    x: float | None
    """Of the mean line; None when it never does."""
    seeds: tuple[float | None, ...]
    """Of each seed alone."""
    from_the_start: bool
    """Whether its first point is there already, so that it says nothing of speed."""
    last_x: float
    ratio: float | None = None
    """x divided by that of the fastest curve; None where either is not known."""


class Threshold(NamedTuple):
    """A value to reach, how it was chosen, and what each curve needs to it."""

    value: float
    chosen: str
    reached: list[Reached]
    """In the order of the curves."""

    @property
    def fastest_first(self) -> list[Reached]:
        return sorted(self.reached, key=lambda one: (one.x is None, one.x or 0.0))


def steps_to(curves: Sequence[Curve], value: float | None = None) -> Threshold | None:
    """The x that each curve, taken as it is (smooth it before), needs to `value`, and the ratios to the fastest.

    The value is approached from the side of the curves' starts; where it lies among them, in the direction that the
    curves go. Without one, each curve that rises has come 90 % of its own way somewhere, and the lowest of these values
    is taken, which they all get to; a run that has just begun does not lower it. None when no curve rises.
    """
    ends = [(float(curve.mean[0]), float(curve.mean[-1])) for curve in curves]
    chosen, rising = "as asked", value is None or _rising(ends, value)
    if value is None:
        long = max(curve.steps[-1] for curve in curves) * LONG
        risen = [
            first + SHARE * (last - first)
            for curve, (first, last) in zip(curves, ends, strict=True)
            if last > first and curve.steps[-1] >= long
        ]
        if not risen:
            return None
        value = min(risen)
        chosen = f"{100 * SHARE:.0f} % of the way from start to end of the curve that gets least far"
    reached = [_reached(curve, value, rising=rising) for curve in curves]
    return Threshold(value, chosen, _with_ratios(reached))


def _rising(ends: Sequence[tuple[float, float]], value: float) -> bool:
    starts = [first for first, _ in ends]
    if min(starts) <= value <= max(starts):
        return sum(last - first for first, last in ends) >= 0
    return value > max(starts)


def _reached(curve: Curve, value: float, *, rising: bool) -> Reached:
    first = _first(curve.mean, value, rising)
    return Reached(
        label=curve.label,
        x=None if first is None else float(curve.mean_x[first]),
        seeds=tuple(
            None if (at := _first(values, value, rising)) is None else float(x[at])
            for x, values in zip(curve.x, curve.values, strict=True)
        ),
        from_the_start=first == 0,
        last_x=float(curve.mean_x[-1]),
    )


def _first(values: Array, value: float, rising: bool) -> int | None:
    there = np.flatnonzero(values >= value if rising else values <= value)
    return int(there[0]) if len(there) else None


def _with_ratios(reached: list[Reached]) -> list[Reached]:
    timed = [one.x for one in reached if one.x is not None and not one.from_the_start]
    fastest = min(timed, default=0.0)
    if any(one.from_the_start for one in reached) or fastest <= 0:
        return reached
    return [one if one.x is None else replace(one, ratio=one.x / fastest) for one in reached]
