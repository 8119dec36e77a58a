"""Hidden states and heads of every role, without models: what the chunked terms are made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, token_terms
from aligndistil.objectives.base import Loss, Objective, Role
from support.micro_batches import given, ragged_batch
from support.objectives import language_roles
from support.plain_formula import plain_loss

VOCAB, HIDDEN = 11, 5

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 1.5},
    "padded": {"padding": 3},
    "tempered": {"temperature": 0.5},
    "capped and tempered": {"softcap": 1.5, "padding": 3, "temperature": 2.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 2.0, "padding": 5},
}


class HiddenStates:
    """One batch, hidden states (B, T, H) and a head for each language model that the loss reads, and what it is given
    beside them.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        padding: int = 0,
        temperature: float = 1.0,
        vocab: int = VOCAB,
        hidden: int = HIDDEN,
        examples: int = 3,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.objective, self.temperature = objective, temperature
        self.batch = ragged_batch(objective.data, examples, vocab).to(device)
        self.hidden: dict[str, Tensor] = {}
        self.heads: dict[str, Head] = {}
        for extra, role in enumerate(language_roles(objective)):
            # every role has padding of its own
            linear = nn.Linear(hidden, vocab + padding * (extra + 1), bias=bias, dtype=dtype, device=device)
            nn.init.normal_(linear.weight, std=1.5)
            linear.requires_grad_(role == Role.POLICY)
            self.hidden[role] = torch.randn(*self.batch.ids_BT.shape, hidden, device=device).to(dtype)
            self.heads[role] = Head(linear, scale, softcap, vocab)
        self.hidden[Role.POLICY].requires_grad_()
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        with torch.no_grad():
            self.found = given(objective, self.batch, self.logits(Role.POLICY).to(wide))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden[Role.POLICY], *self.heads[Role.POLICY].linear.parameters()]

    def logits(self, role: str) -> Tensor:
        head = self.heads[role]
        logits = head.finish(head.linear(self.hidden[role]).flatten(0, 1)).unflatten(0, self.batch.ids_BT.shape)
        return logits / self.temperature

    def plain(self) -> Loss:
        scalars = {
            role: torch.zeros(self.batch.ids_BT.shape) for role, n in self.objective.update_needs.items() if n.is_scalar
        }
        logits = {role: self.logits(role) for role in self.heads}
        return plain_loss(self.objective, self.batch, {**scalars, **logits}, self.found)

    def chunked(self, chunk: int, known: Mapping[str, Tensor] | None, *, compiled: bool = False) -> Loss:
        mask = self.batch.response_BT
        states = {role: hidden[:, :-1][mask[:, 1:]] for role, hidden in self.hidden.items()}
        frozen = {role: FrozenRole(states[role], head) for role, head in self.heads.items() if role != Role.POLICY}
        flat = None if known is None else {name: value.to(mask.device)[mask] for name, value in known.items()}
        ids, how = self.batch.ids_BT[mask], {"temperature": self.temperature, "compiled": compiled}
        plan = Plan(self.objective, self.heads[Role.POLICY], ids, frozen, chunk, flat, **how)  # type: ignore[arg-type]
        terms = token_terms(plan, states[Role.POLICY])
        blank = torch.zeros(mask.shape, dtype=next(iter(terms.values())).dtype, device=mask.device)
        spread = {name: blank.masked_scatter(mask, v) for name, v in terms.items()}
        return self.objective.loss(self.batch, {**spread, **self.found})
