"""A golden case: what an objective is given, and what must come out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.base import Objective

COMMITTED = Path(__file__).parent / "cases"
FOLDER = Path(os.environ.get("ALIGNDISTIL_GOLDEN_DIR") or COMMITTED)
FLOAT32 = 1e-4
"""How far a loss of float32 code may be off, relatively; a mistake that moves a number by less cannot be told apart."""
Content = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Rows of `logits` are in the order of the file; `order` picks the rows of the batch out of them."""

    name: str
    objective: Objective
    batch: Batch
    logits: dict[str, Tensor]
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
    looked_at: Batch | None = None
    """What the preparation of the step looks at, where there is one."""
    looked_at_order: list[int] = field(default_factory=list)
    found: dict[str, float] = field(default_factory=dict)
    """Means over what it looked at."""


@dataclass(frozen=True)
class TermsCase:
    """A case whose file begins where language models have been read: with numbers (B, T) about tokens.

    A column for the prompt stands before those of the file, and what is not part of a response is as the file has it.
    """

    name: str
    objective: Objective
    batch: Batch
    terms: dict[str, Tensor]
    """For `loss`, which is differentiated in them."""
    rollout: dict[str, Tensor] | None = None
    """For `prepare`, where there is one."""
    prepared: dict[str, Tensor] = field(default_factory=dict)
    """What it finds, at response tokens."""
    loss: float | None = None
    critic_loss: float | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """(B, T) in each term, of the mean loss of the policy, and of the critic in its value."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of `loss` and of `prepare`."""
    tolerance: float = 1e-9
    """Of the policy's loss and gradient; the reference whitens advantages in float32."""
    pieces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What a function of this package gives, and what it should."""


def assert_told_apart(distance: float, what: str, *, least: float = FLOAT32) -> None:
    """A wrong value is this far from the golden one, relatively, so that whoever computes it fails.

    The committed files must tell every mistake apart. Another folder need not: then the test is skipped, and says so.
    """
    if distance > least:
        return
    message = f"{FOLDER} cannot tell this apart from what is right, {distance:.1e} away: {what}"
    if FOLDER.resolve() == COMMITTED.resolve():
        pytest.fail(message)
    pytest.skip(message)


def after_prompt(values: Tensor) -> Tensor:
    """Numbers about response tokens with a first column for a prompt of one token."""
    return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair_batch(inputs: Content, chosen: str = "chosen", rejected: str = "rejected") -> Batch:
    """Interleaved, as this package has it; the files stack all first responses on all second ones."""
    ids = torch.tensor([inputs[f"{side}_ids"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    attention = torch.tensor([inputs[f"{side}_attn"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    prompt_lengths = torch.tensor(inputs["prompt_lens"]).repeat_interleave(2)
    return batch_of(DataKind.PAIRS, ids, attention, prompt_lengths)


def batch_of(
    kind: DataKind, ids: Tensor, attention: Tensor, prompt_lengths: Tensor, label: Tensor | None = None
) -> Batch:
    response = attention.bool() & (torch.arange(ids.shape[1]) >= prompt_lengths[:, None])
    desirable = torch.ones(len(ids), dtype=torch.bool) if label is None else label.bool()
    return Batch(kind, ids, attention.bool(), response, desirable)


def interleaved(pairs: int, first: int, second: int) -> list[int]:
    return [row for pair in range(pairs) for row in (first * pairs + pair, second * pairs + pair)]


def about_tokens(values_BT: Tensor) -> Tensor:
    """The files keep a value at the position that predicts, we at the token that is predicted."""
    return torch.roll(values_BT, 1, dims=1)
