"""Words for sentences that list what exists and guess what was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like this one, or None when none is like it."""
    by_normal = {_normal(k): k for k in known}
    found = get_close_matches(_normal(word), by_normal, n=1, cutoff=cutoff)
    return by_normal[found[0]] if found else None


def _normal(word: str) -> str:
    return word.lower().replace("-", "_")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    found = nearest(word, known)
    return f"; did you mean `{found}`?" if found else ""


def listed(words: Iterable[str], joint: str = "and") -> str:
    """`a`, `b` and `c`."""
    *most, last = [f"`{word}`" for word in words] or ["none"]
    return f"{', '.join(most)} {joint} {last}" if most else last


def guess_and_list(word: str, known: Iterable[str], what: str) -> str:
    """`; did you mean ...? The stages are ...`."""
    known = list(known)
    guess = did_you_mean(word, known)
    return f"{guess} The {what} are {listed(known)}" if guess else f"; the {what} are {listed(known)}"
