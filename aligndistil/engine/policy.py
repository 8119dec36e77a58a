"""A causal language model as an objective sees it: response tokens in, per-token terms out. Holds the one shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligndistil.batch import Batch
from aligndistil.engine.head import Head
from aligndistil.engine.rows import hidden_states
from aligndistil.engine.token_terms import FrozenRole, Plan, chunk_size, token_terms
from aligndistil.objectives.base import Objective


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, moved; transformers' own `to` hides its type."""
    return nn.Module.to(model, device)


def response_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(n, H) the hidden states that predict the response tokens of a batch, in row-major order.

    The state at position t - 1 predicts token t: this is the only place that says so.
    """
    of_row: dict[int, Tensor] = {}
    for rows, states in hidden_states(model, batch):
        response = batch.response_BT[rows, 1 : states.shape[1]]
        of_row |= zip(rows.tolist(), states[:, :-1][response].split(response.sum(-1).tolist()), strict=True)
    return torch.cat([of_row[row] for row in range(batch.rows)])


class FrozenModel:
    """A model that is only read: replicated, or sharded by ZeRO-3 when the policy is."""

    def __init__(self, model: PreTrainedModel, vocab: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model, vocab)

    @torch.no_grad()
    def read(self, batch: Batch) -> FrozenRole:
        return FrozenRole(response_hidden(self.model, batch), self.head)


class _Projection(nn.Module):
    """A module around the head's autograd function, so that ZeRO-3 has a place to gather the head's weight at."""

    def forward(self, hidden: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        return tuple(token_terms(plan, hidden).values())


class Policy(nn.Module):
    """The trained model with its chunked head; `forward` gives named terms of shape (B, T)."""

    def __init__(self, model: PreTrainedModel, vocab: int, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.projection = _Projection()
        self._head = Head.of(model, vocab)
        self._chunk = chunk_tokens or chunk_size(vocab)

    @property
    def head(self) -> nn.Linear:
        """The output embeddings."""
        return self._head.linear

    def forward(
        self,
        batch: Batch,
        objective: Objective,
        frozen: Mapping[str, FrozenRole],
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
        preparing: bool = False,
        known: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """`known` is the derivative (B, T) of the loss in the terms, where it is known: see `loss_direction`.

        `temperature` divides the logits of all models.
        """
        hidden = response_hidden(self.model, batch)
        mask = batch.response_BT
        plan = Plan(
            objective,
            self._head,
            batch.ids_BT[mask],
            frozen,
            self._chunk,
            None if known is None else {name: value.to(mask.device)[mask] for name, value in known.items()},
            gathered,
            preparing,
            temperature,
        )
        values = self.projection(hidden, plan)
        blank = torch.zeros(mask.shape, device=mask.device, dtype=values[0].dtype)
        return {name: blank.masked_scatter(mask, value) for name, value in zip(plan.names, values, strict=True)}
