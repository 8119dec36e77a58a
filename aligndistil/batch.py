"""What one step sees, and the one alignment convention of the project.

Shape letters, used as suffixes at function boundaries: B rows, T tokens of the longest row, V vocabulary, E examples
(a pair is one example of two rows), n response tokens, row after row.

**Position t speaks about token t.** `response_BT[b, t]` says that token t of row b belongs to the response, EOS
included; a per-token term at (b, t) is about the distribution that predicted token t. The shift between a model's
output at t - 1 and token t is made once, in `engine/rows.py`, and everything above may forget it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor


class DataKind(StrEnum):
    """What an example is."""

    PAIRS = "pairs"
    """A prompt with a chosen and a rejected response: two rows, interleaved, chosen first."""
    RESPONSES = "responses"
    """A prompt with one response: demonstrations, the chosen halves of pairs, or samples of a rollout."""
    PROMPTS = "prompts"
    """A prompt alone; a rollout answers it."""
    UNPAIRED = "unpaired"
    """A prompt with one response and a desirable / undesirable label."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one prompt and one response, before padding."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    """EOS included where the model or the data really ended; a truncated response has none."""
    label: bool = True
    """Desirable or not; only UNPAIRED data reads it."""
    group: int | None = None
    """The number of the rollout's prompt that this row answers; None for rows that are no samples."""


class Span(NamedTuple):
    """Where a row's response begins and ends; before it is the prompt, after it padding."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows. Rows of PAIRS are interleaved: 2i is chosen, 2i + 1 is rejected."""

    kind: DataKind
    ids_BT: Tensor
    """int64."""
    attention_BT: Tensor
    """bool: prompt and response, not padding. Built from lengths, never from pad ids."""
    response_BT: Tensor
    """bool: response tokens, EOS included."""
    label_B: Tensor
    """bool: desirable; all true unless UNPAIRED."""
    group_B: Tensor | None = None
    """int64: rows with the same number answer the same prompt of a rollout; None for rows that are no samples."""
    spans: tuple[Span, ...] = ()
    """Of each row: what the masks say, in numbers of the processor, which a GPU need not be waited for."""
    response_n: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """int64: the places of the response tokens in the flattened batch (B * T)."""
    shares_prompts: bool = False
    """Whether both rows of every pair have the same prompt."""

    def __post_init__(self) -> None:
        if self.spans:
            return
        starts, ends = self.response_BT.int().argmax(-1).tolist(), self.attention_BT.sum(-1).tolist()
        object.__setattr__(self, "spans", tuple(map(Span, starts, ends)))
        object.__setattr__(self, "response_n", self.response_BT.flatten().nonzero().squeeze(-1))
        if self.kind is DataKind.PAIRS:
            same_BT = self.ids_BT[0::2] == self.ids_BT[1::2]
            shares = all(
                one.start == other.start and bool(same[: one.start].all())
                for one, other, same in zip(self.spans[0::2], self.spans[1::2], same_BT, strict=True)
            )
            object.__setattr__(self, "shares_prompts", shares)

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def width(self) -> int:
        return self.ids_BT.shape[1]

    @property
    def tokens(self) -> int:
        """Of prompts and responses, without padding."""
        return sum(end for _, end in self.spans)

    @property
    def examples(self) -> int:
        """What a batch size counts and a loss is averaged over."""
        return self.rows // 2 if self.kind is DataKind.PAIRS else self.rows

    @property
    def length_B(self) -> Tensor:
        """Response tokens of each row, float."""
        return self.response_BT.sum(-1).to(torch.get_default_dtype())

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; a GPU is sent it while the processor goes on."""
        sends = torch.device(device).type == "cuda" and not self.ids_BT.is_cuda

        def moved(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if sends else tensor.to(device)

        return replace(
            self,
            ids_BT=moved(self.ids_BT),
            attention_BT=moved(self.attention_BT),
            response_BT=moved(self.response_BT),
            label_B=moved(self.label_B),
            group_B=None if self.group_B is None else moved(self.group_B),
            response_n=moved(self.response_n),
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, as wide as the longest of them. Of pairs, both rows of each."""
        chosen, width = torch.tensor(rows, device=self.ids_BT.device), max(self.spans[row].end for row in rows)
        return Batch(
            self.kind,
            self.ids_BT[chosen, :width],
            self.attention_BT[chosen, :width],
            self.response_BT[chosen, :width],
            self.label_B[chosen],
            None if self.group_B is None else self.group_B[chosen],
        )

    def rows_of(self, examples: Iterable[int]) -> list[int]:
        """The rows of some examples."""
        each = self.rows // self.examples
        return [row for example in examples for row in range(example * each, (example + 1) * each)]


def collate(rows: Sequence[Row], kind: DataKind, pad_id: int) -> Batch:
    """Pad rows on the right to the longest of them.

    Raises ValueError when a row has no response token: such rows are dropped, and counted, where data is read.
    """
    longest = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    response_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        if not row.response_ids or not row.prompt_ids:
            raise ValueError(f"row {b} has {len(row.prompt_ids)} prompt and {len(row.response_ids)} response tokens")
        start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.response_ids)
        ids_BT[b, :end] = torch.tensor([*row.prompt_ids, *row.response_ids], dtype=torch.long)
        attention_BT[b, :end] = True
        response_BT[b, start:end] = True
    label_B, groups = torch.tensor([row.label for row in rows]), [row.group for row in rows]
    group_B = None if None in groups else torch.tensor(groups)
    return Batch(kind, ids_BT, attention_BT, response_BT, label_B, group_B)
