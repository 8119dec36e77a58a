"""Per-token terms of an objective from hidden states, without a (B, T, V) tensor.

Response tokens are projected to logits a chunk at a time, and only per-token scalars leave a chunk. Where the
derivative of the loss in the terms is known beforehand (`loss_direction`), the gradient of the head is taken in the
same pass; otherwise the chunks are projected again in the backward pass, when that derivative has arrived.
The gradient of a chunk is written down for the log-softmax and the head, so that autograd only ever sees
`Objective.token_terms` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aligndistil.engine.head import Head, matmul_float32
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk

_CHUNK_BYTES = 40 * 2**20
"""Memory of one chunk's float32 logits; a step holds two (DPO) to seven (AlignDistil) such buffers."""
_SMALLEST_CHUNK = 128
"""Tokens below which reading the head's weight, and adding to its gradient, costs more than the products themselves."""


def chunk_size(vocab: int) -> int:
    """Tokens per chunk when the recipe leaves it to us."""
    return max(_SMALLEST_CHUNK, _CHUNK_BYTES // (4 * vocab))


@dataclass(frozen=True, slots=True)
class FrozenRole:
    """A frozen model's hidden states (n, H) of the response tokens, and its head."""

    hidden: Tensor
    head: Head


@dataclass(slots=True)
class Plan:
    """Everything about one call that is not a differentiable tensor."""

    objective: Objective
    head: Head
    ids: Tensor
    """(n,) response tokens."""
    frozen: Mapping[str, FrozenRole]
    chunk: int
    known: Mapping[str, Tensor] | None
    """(n,) derivative of the loss in each term, up to one common factor; None when it is not known yet."""
    gathered: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the frozen heads' weights whole under ZeRO-3."""
    preparing: bool = False
    """Whether the terms are for `Objective.prepare`."""
    temperature: float = 1.0
    """All logits are divided by it."""
    frozen_logp: dict[str, Tensor] = field(default_factory=dict)
    own_logp: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for role, frozen in self.frozen.items():
            self.frozen_logp[role] = torch.empty(len(self.ids), device=self.ids.device, dtype=_wide(frozen.hidden))
            if self.temperature != 1.0:
                self.own_logp[role] = torch.empty_like(self.frozen_logp[role])

    @property
    def slices(self) -> Iterator[slice]:
        for start in range(0, len(self.ids), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.ids)))

    @property
    def needs(self) -> Mapping[str, Need]:
        return self.objective.needs if self.preparing else self.objective.update_needs

    @property
    def policy_need(self) -> Need:
        return self.needs[Role.POLICY]

    def tempered(self, values: Tensor) -> Tensor:
        """Logits, or a gradient in tempered logits, divided in their own memory."""
        return values if self.temperature == 1.0 else values.div_(self.temperature)

    def terms_of(
        self, rows: slice, logp: Mapping[str, Tensor], policy_logp: Tensor, logps: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        objective, own_logp = self.objective, {role: values[rows] for role, values in self.own_logp.items()}
        chunk = TokenChunk(self.ids[rows], {**logp, Role.POLICY: policy_logp}, logps, own_logp)
        return objective.preparation_terms(chunk) if self.preparing else objective.token_terms(chunk)


def token_terms(plan: Plan, hidden: Tensor) -> dict[str, Tensor]:
    """Named terms (n,) of n response tokens, differentiable in `hidden` (n, H) and in the head's weight and bias."""
    linear = plan.head.linear
    stacked: Tensor = _TokenTerms.apply(hidden, linear.weight, linear.bias, plan)  # type: ignore[no-untyped-call]
    return dict(zip(plan.names, stacked, strict=True))


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        take_gradient = plan.known is not None and any(ctx.needs_input_grad)
        sums = _GradientSums.like(hidden, weight, bias, ctx.needs_input_grad) if take_gradient else None
        stacked: list[Tensor] = []
        with plan.gathered():
            for rows in plan.slices:
                logp, logps = _frozen_chunk(plan, rows, first_pass=True)
                if sums is None:
                    terms = _terms_only(plan, hidden[rows], rows, logp, logps)
                else:
                    cotangent = {name: value[rows] for name, value in (plan.known or {}).items()}
                    terms, grad_raw = _terms_and_gradient(plan, hidden[rows], rows, logp, logps, cotangent)
                    sums.add(rows, grad_raw, hidden[rows], weight)
                plan.names = list(terms)
                stacked.append(torch.stack([terms[name].detach() for name in plan.names]))
        ctx.dtypes = (hidden.dtype, weight.dtype)
        if sums is None:
            ctx.save_for_backward(hidden, weight, bias)
        else:
            # autograd drops what it saved once backward returns, so the sums become the .grad without a copy
            ctx.save_for_backward(hidden, weight, bias, sums.hidden, sums.weight, sums.bias)
        return torch.cat(stacked, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        hidden, weight, bias, *taken = ctx.saved_tensors
        if taken and (factor := _common_factor(plan, grad)) is not None:
            return (*_GradientSums(taken[0], taken[1], taken[2], ctx.dtypes).results(factor), None)
        sums = _GradientSums.like(hidden, weight, bias, ctx.needs_input_grad)
        with plan.gathered():
            for rows in plan.slices:
                logp, logps = _frozen_chunk(plan, rows, first_pass=False)
                cotangent = {name: grad[k, rows] for k, name in enumerate(plan.names)}
                _, grad_raw = _terms_and_gradient(plan, hidden[rows], rows, logp, logps, cotangent)
                sums.add(rows, grad_raw, hidden[rows], weight)
        return (*sums.results(1.0), None)


def _frozen_chunk(plan: Plan, rows: slice, first_pass: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probability of the tokens, and of the whole vocabulary where needed, for every frozen role."""
    logps: dict[str, Tensor] = {}
    for role, frozen in plan.frozen.items():
        whole = plan.needs[role] is Need.DISTRIBUTION
        if not whole and not first_pass:
            continue
        logits = frozen.head.finish(frozen.head.project(frozen.hidden[rows]))
        if plan.own_logp:
            plan.own_logp[role][rows] = _pick(logits, plan.ids[rows]) - logits.logsumexp(-1)
        logits = plan.tempered(logits)
        if whole:
            logps[role] = logits.sub_(logits.logsumexp(-1, keepdim=True))
            plan.frozen_logp[role][rows] = _pick(logits, plan.ids[rows])
        else:
            plan.frozen_logp[role][rows] = _logp_and_softmax(logits, plan.ids[rows])[0]
    return {role: values[rows] for role, values in plan.frozen_logp.items()}, logps


def _terms_only(
    plan: Plan, hidden: Tensor, rows: slice, logp: dict[str, Tensor], logps: dict[str, Tensor]
) -> dict[str, Tensor]:
    logits = plan.tempered(plan.head.finish(plan.head.project(hidden)))
    if plan.policy_need is Need.DISTRIBUTION:
        logps = {**logps, Role.POLICY: logits.sub_(logits.logsumexp(-1, keepdim=True))}
        policy_logp = _pick(logits, plan.ids[rows])
    else:
        policy_logp, _ = _logp_and_softmax(logits, plan.ids[rows])
    return plan.terms_of(rows, logp, policy_logp, logps)


def _terms_and_gradient(
    plan: Plan,
    hidden: Tensor,
    rows: slice,
    logp: dict[str, Tensor],
    logps: dict[str, Tensor],
    cotangent: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of a chunk, and the gradient (n, all rows of the head) of sum(cotangent * term) in the raw product."""
    raw = plan.head.project(hidden)
    if plan.head.is_plain:
        logits = plan.tempered(raw[:, : plan.head.vocab])
        terms, grad_logits = _gradient_in_logits(plan, logits, rows, logp, logps, cotangent)
        return terms, plan.tempered(grad_logits)
    with torch.enable_grad():
        logits = plan.head.finish(raw.requires_grad_())
    own = plan.tempered(logits.detach().clone())
    terms, grad_logits = _gradient_in_logits(plan, own, rows, logp, logps, cotangent)
    (grad_raw,) = torch.autograd.grad(logits, raw, plan.tempered(grad_logits))
    return terms, grad_raw[:, : plan.head.vocab]


def _gradient_in_logits(
    plan: Plan,
    logits: Tensor,
    rows: slice,
    logp: dict[str, Tensor],
    logps: dict[str, Tensor],
    cotangent: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Overwrites `logits` (n, V). Through the log-softmax l of z: dz = dl - softmax(z) * sum(dl)."""
    ids = plan.ids[rows]
    if plan.policy_need is Need.DISTRIBUTION:
        leaf = logits.sub_(logits.logsumexp(-1, keepdim=True)).requires_grad_()
        logps = {**logps, Role.POLICY: leaf}
    else:
        leaf, softmax = _logp_and_softmax(logits, ids)
        leaf.requires_grad_()
    with torch.enable_grad():
        policy_logp = _pick(leaf, ids) if plan.policy_need is Need.DISTRIBUTION else leaf
        terms = plan.terms_of(rows, logp, policy_logp, logps)
        learnt = [terms[name] for name in cotangent if terms[name].requires_grad]
        weights = [cotangent[name].to(terms[name].dtype) for name in cotangent if terms[name].requires_grad]
        (grad_leaf,) = torch.autograd.grad(learnt, leaf, weights)
    terms = {name: value.detach() for name, value in terms.items()}
    if plan.policy_need is Need.DISTRIBUTION:
        total = grad_leaf.sum(-1, keepdim=True)
        return terms, grad_leaf.addcmul_(leaf.detach().exp_(), total, value=-1)
    grad = softmax.mul_(-grad_leaf.unsqueeze(-1))
    grad[torch.arange(len(ids), device=ids.device), ids] += grad_leaf
    return terms, grad


@dataclass(slots=True)
class _GradientSums:
    """Gradients of the hidden states, the head's weight and its bias, summed in float32 over chunks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype]

    @classmethod
    def like(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> _GradientSums:
        wide = _wide(hidden)
        return cls(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None,
            torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and wanted[2] else None,
            (hidden.dtype, weight.dtype),
        )

    def add(self, rows: slice, grad_raw: Tensor, hidden: Tensor, weight: Tensor) -> None:
        vocab = grad_raw.shape[1]
        narrow = grad_raw.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = narrow @ weight[:vocab].to(hidden.dtype)
        if self.weight is not None:
            if self.weight.dtype == hidden.dtype:
                self.weight[:vocab].addmm_(narrow.t(), hidden)
            else:
                self.weight[:vocab] += matmul_float32(narrow.t(), hidden)
        if self.bias is not None:
            self.bias[:vocab] += grad_raw.sum(0)

    def results(self, factor: float) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kinds = (self.dtypes[0], self.dtypes[1], self.dtypes[1])
        sums = (self.hidden, self.weight, self.bias)
        scaled = [None if s is None else s.mul_(factor).to(kind) for s, kind in zip(sums, kinds, strict=True)]
        return scaled[0], scaled[1], scaled[2]


def _common_factor(plan: Plan, grad: Tensor) -> float | None:
    """What the derivative that arrived is a multiple of the known one by; None where it is none, at some token."""
    assert plan.known is not None
    zero = torch.zeros(len(plan.ids), device=grad.device)
    known = torch.stack([plan.known.get(name, zero).to(grad.dtype) for name in plan.names])
    arrived, expected = grad.double(), known.double()
    if not torch.isfinite(arrived).all():  # the loop says so; a factor would hide where
        return None
    factor = (arrived * expected).sum() / expected.square().sum().clamp(min=1e-300)
    close = torch.allclose(arrived, factor * expected, rtol=1e-3, atol=1e-9 * float(arrived.abs().max()) + 1e-300)
    return float(factor) if close else None


def _logp_and_softmax(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-probability of the tokens, and the softmax (n, V) in the memory of `logits`."""
    largest = logits.amax(-1, keepdim=True)
    picked = _pick(logits, ids)
    numerators = logits.sub_(largest).exp_()
    total = numerators.sum(-1, keepdim=True)
    return picked - (largest + total.log()).squeeze(-1), numerators.div_(total)


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """(n,) the entry of each row (n, V) that belongs to its token."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _wide(hidden: Tensor) -> torch.dtype:
    return hidden.dtype if hidden.dtype == torch.float64 else torch.float32
