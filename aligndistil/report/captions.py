"""What stands below a picture, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from aligndistil.report.curves import UNITS, Curve
from aligndistil.report.smoothing import Usual
from aligndistil.report.thresholds import Reached, Threshold

CHARACTERS = 108
"""In a line of the caption."""


def caption_of(
    curves: Sequence[Curve], metric: str, x: str, reach: float | Usual, threshold: Threshold | None
) -> list[str]:
    """The lines below a picture: what is drawn, how it was smoothed, what each method needs to the threshold."""
    told = [f"{metric}{'' if x in UNITS else f' against {x}'}. {_what_is_drawn(curves, x, reach)}"]
    if threshold is not None:
        told.append(
            f"{in_words(threshold, x)} "
            + "; ".join(needed(one, x).replace(" ", "\N{NO-BREAK SPACE}") for one in threshold.fastest_first)
            + "."
        )
        if _several(curves):
            told[-1] += " Counted on the mean line; a comparison's table has the mean of each seed's own."
    return [line for text in told for line in textwrap.wrap(text, CHARACTERS, break_on_hyphens=False)]


def _several(curves: Sequence[Curve]) -> bool:
    return any(curve.seeds > 1 for curve in curves)


def _what_is_drawn(curves: Sequence[Curve], x: str, reach: float | Usual) -> str:
    parts = []
    number = _number_of_seeds(curves)
    if x not in UNITS:
        parts.append("Each path runs from the first step (hollow) to the last (filled).")
        if _several(curves):
            parts.append(f"Heavy: mean over {number}; light: each seed; cross: one standard deviation over the seeds.")
    elif _several(curves):
        parts.append(f"Line: mean over {number}; band: one standard deviation over the seeds on either side.")
        if x != "step":
            parts.append(f"{UNITS[x].capitalize()} are the mean over the seeds at the same step.")
    if x in UNITS and any(curve.seeds == 1 and curve.reach(reach) > 0 for curve in curves):
        parts.append("Light: the values that were logged" + (" of a single seed." if _several(curves) else "."))
    return " ".join([*parts, *_smoothing(curves, reach)])


def _smoothing(curves: Sequence[Curve], reach: float | Usual) -> list[str]:
    """What was averaged, and which curves were not: by the reach that most have, then by what others have."""
    by_reach: dict[float, list[str]] = {}
    for curve in curves:
        by_reach.setdefault(curve.reach(reach), []).append(curve.label)
    plain = by_reach.pop(0.0, [])
    if not by_reach:
        return []
    most, *others = sorted(by_reach, key=lambda steps: -len(by_reach[steps]))
    but = "; ".join(f"{steps:g}: {_listed(by_reach[steps])}" for steps in others)
    what = "Each seed smoothed" if _several(curves) else "Smoothed"
    said = [f"{what}: mean over {most:g} steps on either side{f' ({but})' if but else ''}."]
    return [*said, f"Not smoothed, too few points: {_listed(plain)}."] if plain else said


def _listed(labels: Sequence[str]) -> str:
    """As many as a line of the caption has room for, the first one at least, and how many more there are."""
    shown = [label for i, label in enumerate(labels) if not i or len(", ".join(labels[: i + 1])) < CHARACTERS]
    return ", ".join(shown) + (f" and {len(labels) - len(shown)} more" if len(labels) > len(shown) else "")


def _number_of_seeds(curves: Sequence[Curve]) -> str:
    """`3 seeds`; where it differs, `3 (a, b) or 1 (c) seeds`, or `3 (15 curves)` where names would fill a line."""
    counts = sorted({curve.seeds for curve in curves}, reverse=True)
    if len(counts) == 1:
        return f"{counts[0]} seeds"
    by_count = {n: [curve.label for curve in curves if curve.seeds == n] for n in counts}
    told = {
        n: names if len(names := ", ".join(labels)) < CHARACTERS / 2 else f"{len(labels)} curves"
        for n, labels in by_count.items()
    }
    return " or ".join(f"{n} ({names})" for n, names in told.items()) + " seeds"


def in_words(threshold: Threshold, x: str) -> str:
    """The threshold and how it was chosen, as the beginning of a sentence."""
    return f"{UNITS[x].capitalize()} to reach {threshold.value:.3g} ({threshold.chosen}):"


def needed(one: Reached, x: str) -> str:
    """What one method needs, and how many times what the fastest does."""
    if one.x is None:
        return f"{one.label} never, in {amount(one.last_x)}"
    if one.from_the_start:
        return f"{one.label} from its first point"
    return f"{one.label} {amount(one.x)}" + (f" ({one.ratio:.1f}x)" if one.ratio is not None else "")


def amount(x: float) -> str:
    """A number of steps, tokens or seconds."""
    return f"{x:,.0f}" if x >= 100 or x == int(x) else f"{x:.3g}"
