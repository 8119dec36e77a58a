"""A golden case: what an objective is given, and what must come out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.base import Objective, Role

FOLDER = Path(os.environ.get("ALIGNDISTIL_GOLDEN_DIR") or Path(__file__).parent / "cases")
Content = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Rows of `logits` are in the order of the file; `order` picks the rows of the batch out of them."""

    name: str
    objective: Objective
    batch: Batch
    logits: dict[Role, Tensor]
    order: list[int]
    loss: float | None = None
    gradient: Tensor | None = None
    """In the policy's logits, rows as in the file."""
    per_example: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    """(B, T), about the token at their position."""
    per_row: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the response of these terms, (B,)."""
    metrics: dict[str, float] = field(default_factory=dict)
    float32: dict[str, float] = field(default_factory=dict)
    """Losses of code that computes in float32, on aligned positions."""
    faults: dict[str, float] = field(default_factory=dict)
    """Losses of code with a known fault."""


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair_batch(inputs: Content, chosen: str = "chosen", rejected: str = "rejected") -> Batch:
    """Interleaved, as this package has it; the files stack all first responses on all second ones."""
    ids = torch.tensor([inputs[f"{side}_ids"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    attention = torch.tensor([inputs[f"{side}_attn"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    prompt_lengths = torch.tensor(inputs["prompt_lens"]).repeat_interleave(2)
    return batch_of(DataKind.PAIRS, ids, attention, prompt_lengths)


def batch_of(kind: DataKind, ids: Tensor, attention: Tensor, prompt_lengths: Tensor) -> Batch:
    after_prompt = torch.arange(ids.shape[1]) >= prompt_lengths[:, None]
    return Batch(kind, ids, attention.bool(), attention.bool() & after_prompt, torch.ones(len(ids), dtype=torch.bool))


def interleaved(pairs: int, first: int, second: int) -> list[int]:
    return [row for pair in range(pairs) for row in (first * pairs + pair, second * pairs + pair)]


def about_tokens(values_BT: Tensor) -> Tensor:
    """The files keep a value at the position that predicts, we at the token that is predicted."""
    return torch.roll(values_BT, 1, dims=1)
