"""What one step sees, and the one alignment convention of the project.

Shape letters, used as suffixes at function boundaries: B rows, T tokens of the longest row, V vocabulary, E examples
(a pair is one example of two rows), n response tokens of a chunk.

**Position t speaks about token t.** `response_BT[b, t]` says that token t of row b belongs to the response, EOS
included; a per-token term at (b, t) is about the distribution that predicted token t. The shift between a model's
output at t - 1 and token t is made once, in `engine/policy.py`, and everything above may forget it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
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

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def examples(self) -> int:
        """What a batch size counts and a loss is averaged over."""
        return self.rows // 2 if self.kind is DataKind.PAIRS else self.rows

    @property
    def length_B(self) -> Tensor:
        """Response tokens of each row, float."""
        return self.response_BT.sum(-1).to(torch.get_default_dtype())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            attention_BT=self.attention_BT.to(device),
            response_BT=self.response_BT.to(device),
            label_B=self.label_B.to(device),
            group_B=None if self.group_B is None else self.group_B.to(device),
        )


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


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches of one kind, padded to the longest of them."""
    width = max(batch.ids_BT.shape[1] for batch in batches)

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])

    groups = [batch.group_B for batch in batches if batch.group_B is not None]
    return Batch(
        batches[0].kind,
        stacked([batch.ids_BT for batch in batches]),
        stacked([batch.attention_BT for batch in batches]),
        stacked([batch.response_BT for batch in batches]),
        torch.cat([batch.label_B for batch in batches]),
        torch.cat(groups) if len(groups) == len(batches) else None,
    )
