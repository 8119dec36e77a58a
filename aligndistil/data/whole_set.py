"""What is odd about a set of examples although each of them is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aligndistil.batch import DataKind
from aligndistil.data.cache import RESPONSE_HASH, ROW_HASH

MOST_ALIKE = 0.5
"""The share of examples from which on it is odd that they have the same response."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What tells N examples apart, each of R rows."""

    kind: DataKind
    hashes: NDArray[np.uint64]
    """(N, R, 2): see `EncodedRows`."""
    labels: NDArray[np.bool_]
    """(N, R): desirable or not."""
    keys: Sequence[tuple[str, NDArray[np.int64]]]
    """By source its name and the raw rows of its examples."""

    def key(self, index: int) -> str:
        """See `Examples.key`."""
        for name, origins in self.keys:
            if index < len(origins):
                return f"{name}:{origins[index]}"
            index -= len(origins)
        raise IndexError(index)


def remarks(answers: Answers) -> list[str]:
    """A sentence for each fact that a person should know; none of them stops a run."""
    rows = answers.hashes[:, :, ROW_HASH]
    # An unpaired response may stand in the data with either label: that is no repetition.
    _, first, which = np.unique(
        _together(rows) + answers.labels[:, 0].astype(np.uint64), return_index=True, return_inverse=True
    )
    repeats = np.flatnonzero(first[which] != np.arange(len(which)))
    found = []
    if len(repeats):
        again, before = answers.key(int(repeats[0])), answers.key(int(first[which[repeats[0]]]))
        found.append(f"{len(repeats)} of {len(rows)} examples repeat an earlier one ({again} is {before})")
    different = np.sort(first)
    if answers.kind is DataKind.PAIRS:
        twice, (one, other) = _twice(np.sort(rows[different], 1), different, answers)
        if twice:
            found.append(
                f"{twice} pair(s) stand in the data both ways round: what is chosen in {one} is rejected in {other}"
            )
    if answers.kind is DataKind.UNPAIRED:
        twice, (one, other) = _twice(rows[different], different, answers)
        if twice:
            found.append(f"{twice} response(s) are labelled both desirable and undesirable ({one} and {other})")
    if answers.kind is not DataKind.PROMPTS:
        found += _same_response(answers, different)
    return found


def _together(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One hash of the hashes of an example's rows, in their order."""
    factors = np.array([1, 0x9E3779B97F4A7C15], np.uint64)[: rows.shape[1]]
    together: NDArray[np.uint64] = (rows * factors).sum(1, dtype=np.uint64)
    return together


def _twice(rows: NDArray[np.uint64], examples: NDArray[np.int64], answers: Answers) -> tuple[int, tuple[str, str]]:
    """How many of `rows` there are more than once, and two examples that have the first of them."""
    _, first, which, counts = np.unique(_together(rows), return_index=True, return_inverse=True, return_counts=True)
    if not (counts > 1).any():
        return 0, ("", "")
    one, other, *_ = np.flatnonzero(which == which[first[counts > 1].min()])
    return int((counts > 1).sum()), (answers.key(int(examples[one])), answers.key(int(examples[other])))


def _same_response(answers: Answers, different: NDArray[np.int64]) -> list[str]:
    names = ("chosen", "rejected") if answers.kind is DataKind.PAIRS else ("",)
    found = []
    for place, name in enumerate(names):
        _, counts = np.unique(answers.hashes[different, place, RESPONSE_HASH], return_counts=True)
        if (most := int(counts.max())) > max(1, MOST_ALIKE * len(different)):
            what = " ".join(["the same", *filter(None, [name]), "response"])
            found.append(f"{most} of {len(different)} examples have {what}")
    return found
