"""A causal language model as an objective sees it: response tokens in, per-token terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligndistil.batch import Batch
from aligndistil.engine.head import Head
from aligndistil.engine.rows import Body
from aligndistil.engine.token_terms import FrozenRole, Plan, chunk_size, token_terms
from aligndistil.objectives.base import Objective


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, moved; transformers' own `to` hides its type."""
    return nn.Module.to(model, device)


class FrozenModel:
    """A model that is only read: replicated, or sharded by ZeRO-3 when the policy is."""

    def __init__(self, model: PreTrainedModel, vocab: int, *, share_prompts: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model, vocab)
        self._body = Body(model, share_prompts=share_prompts)

    @torch.no_grad()
    def read(self, batch: Batch) -> FrozenRole:
        return FrozenRole(self._body.response_states(batch), self.head)


class _Projection(nn.Module):
    """A module around the head's autograd function, so that ZeRO-3 has a place to gather the head's weight at."""

    def forward(self, hidden: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        return tuple(token_terms(plan, hidden).values())


class Policy(nn.Module):
    """The trained model with its chunked head; `forward` gives named terms of shape (B, T)."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab: int,
        chunk_tokens: int | None = None,
        *,
        share_prompts: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._body = Body(model, share_prompts=share_prompts)
        self.projection = _Projection()
        self._head = Head.of(model, vocab)
        self._chunk, self._compiled = chunk_tokens or chunk_size(vocab, model.device), compiled

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
        hidden = self._body.response_states(batch)
        shape, response_n = batch.ids_BT.shape, batch.response_n
        if known is not None:
            known = {name: value.to(response_n.device).flatten()[response_n] for name, value in known.items()}
        plan = Plan(
            objective,
            self._head,
            batch.ids_BT.flatten()[response_n],
            frozen,
            self._chunk,
            known,
            gathered,
            preparing,
            temperature,
            self._compiled,
        )
        values = self.projection(hidden, plan)
        blank = torch.zeros(shape.numel(), device=response_n.device, dtype=values[0].dtype)
        return {
            name: blank.index_put((response_n,), value).view(shape)
            for name, value in zip(plan.names, values, strict=True)
        }
