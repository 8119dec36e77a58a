"""Which examples a process holds at once: those of similar length, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """How examples are cut into micro-batches."""

    size: int
    """Examples of each."""
    tokens: int | None = None
    """Instead: tokens of each, padding included. An example that is longer is alone."""

    def cut(self, lengths: Sequence[int], rows: int = 1, *, multiple: int = 1, least: int = 1) -> list[list[int]]:
        """The places of all examples, longest first, by the length of each example's longest row; `rows` it has.

        There are `least` micro-batches or more, and their number is a multiple of `multiple`: ZeRO-3 gathers weights in
        every pass, so all processes need the same number of passes. Where memory runs out, it does so at the first.
        Raises ValueError when there are too few examples for that.
        """
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        cut = [[order[0]]]
        for place in order[1:]:
            longest = lengths[cut[-1][0]]
            full = self.size if self.tokens is None else self.tokens // (longest * rows)
            if len(cut[-1]) < full:
                cut[-1].append(place)
            else:
                cut.append([place])
        wanted = max(-(-len(cut) // multiple) * multiple, least)
        if wanted > len(lengths):
            raise ValueError(f"{len(lengths)} examples do not make {wanted} micro-batches")
        while len(cut) < wanted:
            largest = max(range(len(cut)), key=lambda i: len(cut[i]))
            whole = cut[largest]
            cut[largest : largest + 1] = [whole[: -(-len(whole) // 2)], whole[-(-len(whole) // 2) :]]
        return cut
