"""Per-token terms of an objective from hidden states, without a (B, T, V) tensor.

Response tokens are projected to logits a chunk at a time, and only per-token scalars leave a chunk. Where the
derivative of the loss in the terms is known beforehand (`loss_direction`), the gradient of the head is taken in the
same pass; otherwise when that derivative has arrived: from the softmax of a chunk where there is room to keep it, and
by projecting the chunk again where there is none.
The gradient of a chunk is written down for the log-softmax and the head, so that autograd only ever sees
`Objective.token_terms` itself. Compiled, what a chunk takes between two products is one kernel or two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aligndistil.engine.head import Head, add_product, finished
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk

_CHUNK_BYTES = 31 * 2**20
"""Memory of one chunk's float32 logits on a CPU; a step holds two (DPO) to seven (AlignDistil) such buffers. A little
below what glibc takes from the system anew each time."""
_SMALLEST_CHUNK = 128
"""Tokens below which reading the head's weight, and adding to its gradient, costs more than the products themselves."""
_CUDA_CHUNKS, _CUDA_SHARE = (1024, 4096), 1 / 64
"""Fewest and most tokens on a GPU, and the share of its memory that one such buffer may take between them."""
KEPT_BYTES, KEPT_SHARE = 128 * 2**20, 1 / 8
"""Room for softmaxes that are kept for the backward pass: on a CPU, and of the free memory of a GPU."""


def chunk_size(vocab: int, device: torch.device | str = "cpu", memory: int | None = None) -> int:
    """Tokens per chunk when the recipe leaves it to us. `memory` is the GPU's in bytes, where it is known."""
    device = torch.device(device)
    if device.type != "cuda":
        return max(_SMALLEST_CHUNK, _CHUNK_BYTES // (4 * vocab))
    memory = memory or torch.cuda.get_device_properties(device).total_memory
    fewest, most = _CUDA_CHUNKS
    return min(most, max(fewest, int(memory * _CUDA_SHARE) // (4 * vocab) // 128 * 128))


def _room_to_keep(device: torch.device) -> int:
    if device.type != "cuda":
        return KEPT_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((torch.cuda.mem_get_info(device)[0] + cached) * KEPT_SHARE)


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
    compiled: bool = False
    """Whether `torch.compile` makes one kernel of what eager torch does in many."""
    frozen_logp: dict[str, Tensor] = field(default_factory=dict)
    own_logp: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    learns: bool = True
    """Whether a backward pass may follow; inside of an autograd function, gradients are always switched off."""
    softmax: dict[int, Tensor] = field(default_factory=dict)
    """The policy's, of the chunks that have room for it, by their first token; `policy_logp` is of the same chunks."""
    policy_logp: dict[int, Tensor] = field(default_factory=dict)

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

    @property
    def compiles_terms(self) -> bool:
        """Whether the objective's terms are part of the kernel: where they see the policy's whole vocabulary."""
        return self.compiled and self.policy_need is Need.DISTRIBUTION

    def tempered(self, values: Tensor) -> Tensor:
        """Logits, or a gradient in tempered logits, divided in their own memory."""
        return values if self.temperature == 1.0 else values.div_(self.temperature)

    def terms_of(
        self, rows: slice, logp: Mapping[str, Tensor], policy_logp: Tensor, logps: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        own_logp = {role: values[rows] for role, values in self.own_logp.items()}
        chunk = TokenChunk(self.ids[rows], {**logp, Role.POLICY: policy_logp}, logps, own_logp)
        return _terms(self.objective, self.preparing, chunk)

    def terms_of_raw(self, rows: slice, raw: Mapping[str, Tensor], logp: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the raw products of all roles that are needed as a DISTRIBUTION, compiled."""
        heads = {role: frozen.head for role, frozen in self.frozen.items()} | {str(Role.POLICY): self.head}
        after = tuple((role, heads[role].scale, heads[role].softcap, heads[role].vocab) for role in raw)
        function = _compiled_terms(self.objective, self.preparing, self.temperature, after)
        known = {role: value for role, value in logp.items() if role not in raw}
        own_logp = {role: values[rows] for role, values in self.own_logp.items()}
        return function(*_any_length(self.ids[rows], dict(raw), known, own_logp))


def _terms(objective: Objective, preparing: bool, chunk: TokenChunk) -> dict[str, Tensor]:
    return objective.preparation_terms(chunk) if preparing else objective.token_terms(chunk)


@functools.lru_cache(maxsize=64)
def _compiled_terms(
    objective: Objective, preparing: bool, temperature: float, after: tuple[tuple[str, float, float | None, int], ...]
) -> Callable[..., dict[str, Tensor]]:
    """Terms from tokens (n,), raw products (n, rows of the head) by role, and log-probabilities (n,) of other roles."""

    def terms(
        ids: Tensor, raw: dict[str, Tensor], logp: dict[str, Tensor], own_logp: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        logps = {}
        for role, scale, softcap, vocab in after:
            logits = finished(raw[role], scale, softcap, vocab) / temperature
            logps[role] = logits - logits.logsumexp(-1, keepdim=True)
            logp = {**logp, role: _pick(logps[role], ids)}
        return _terms(objective, preparing, TokenChunk(ids, logp, logps, own_logp))

    compiled: Callable[..., dict[str, Tensor]] = torch.compile(terms)
    return compiled


@functools.lru_cache(maxsize=1)
def _compiled_softmax() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    compiled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.compile(_logp_and_softmax)
    return compiled


def _any_length(*given: Any) -> tuple[Any, ...]:
    """The same arguments, for a kernel that takes any number of tokens: what a step computes must not depend on which
    chunks came before."""
    for one in given:
        for tensor in one.values() if isinstance(one, dict) else [one]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return given


def token_terms(plan: Plan, hidden: Tensor) -> dict[str, Tensor]:
    """Named terms (n,) of n response tokens, differentiable in `hidden` (n, H) and in the head's weight and bias."""
    linear, plan.learns = plan.head.linear, torch.is_grad_enabled()
    stacked: Tensor = _TokenTerms.apply(hidden, linear.weight, linear.bias, plan)  # type: ignore[no-untyped-call]
    return dict(zip(plan.names, stacked, strict=True))


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        learns = plan.learns and any(ctx.needs_input_grad)
        take_gradient = plan.known is not None and learns
        sums = _GradientSums.like(hidden, weight, bias, ctx.needs_input_grad) if take_gradient else None
        # One is kept as it is only where the gradient in logits is that in the product.
        keeps = learns and not take_gradient and plan.policy_need is Need.LOGP and plan.head.is_plain
        room = _room_to_keep(hidden.device) if keeps else 0
        stacked: list[Tensor] = []
        with plan.gathered():
            for rows in plan.slices:
                logp, whole = _frozen_chunk(plan, rows, first_pass=True)
                if sums is None:
                    room -= 4 * plan.head.vocab * (rows.stop - rows.start)
                    terms = _terms_only(plan, hidden[rows], rows, logp, whole, keep=room >= 0)
                else:
                    cotangent = {name: value[rows] for name, value in (plan.known or {}).items()}
                    terms, grad_raw = _terms_and_gradient(plan, hidden[rows], rows, logp, whole, cotangent)
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
                logp, whole = _frozen_chunk(plan, rows, first_pass=False)
                cotangent = {name: grad[k, rows] for k, name in enumerate(plan.names)}
                _, grad_raw = _terms_and_gradient(plan, hidden[rows], rows, logp, whole, cotangent)
                sums.add(rows, grad_raw, hidden[rows], weight)
        return (*sums.results(1.0), None)


def _frozen_chunk(plan: Plan, rows: slice, first_pass: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every frozen role the log-probability of the tokens, and of those that are needed as a DISTRIBUTION that of
    the whole vocabulary; compiled, those are given as raw products."""
    whole: dict[str, Tensor] = {}
    for role, frozen in plan.frozen.items():
        distribution = plan.needs[role] is Need.DISTRIBUTION
        if not distribution and not first_pass:
            continue
        raw = frozen.head.project(frozen.hidden[rows])
        if plan.own_logp:
            logits = frozen.head.finish(raw)
            plan.own_logp[role][rows] = _pick(logits, plan.ids[rows]) - logits.logsumexp(-1)
        if distribution and plan.compiles_terms:
            whole[role] = raw
            continue
        logits = plan.tempered(frozen.head.finish(raw))
        if distribution:
            whole[role] = logits.sub_(logits.logsumexp(-1, keepdim=True))
            plan.frozen_logp[role][rows] = _pick(logits, plan.ids[rows])
        else:
            plan.frozen_logp[role][rows] = _softmax_of(plan, logits, rows)[0]
    return {role: values[rows] for role, values in plan.frozen_logp.items()}, whole


def _softmax_of(plan: Plan, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(n,) log-probability of the tokens, and the softmax (n, V); overwrites `logits` where it is not compiled."""
    ids = plan.ids[rows]
    return _compiled_softmax()(*_any_length(logits, ids)) if plan.compiled else _logp_and_softmax(logits, ids)


def _terms_only(
    plan: Plan, hidden: Tensor, rows: slice, logp: dict[str, Tensor], whole: dict[str, Tensor], *, keep: bool
) -> dict[str, Tensor]:
    raw = plan.head.project(hidden)
    if plan.compiles_terms:
        return plan.terms_of_raw(rows, {**whole, str(Role.POLICY): raw}, logp)
    logits = plan.tempered(plan.head.finish(raw))
    if plan.policy_need is Need.DISTRIBUTION:
        whole = {**whole, Role.POLICY: logits.sub_(logits.logsumexp(-1, keepdim=True))}
        policy_logp = _pick(logits, plan.ids[rows])
    else:
        policy_logp, softmax = _softmax_of(plan, logits, rows)
        if keep:
            plan.softmax[rows.start] = softmax
            plan.policy_logp[rows.start] = policy_logp
    return plan.terms_of(rows, logp, policy_logp, whole)


def _terms_and_gradient(
    plan: Plan,
    hidden: Tensor,
    rows: slice,
    logp: dict[str, Tensor],
    whole: dict[str, Tensor],
    cotangent: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of a chunk, and the gradient (n, V) of sum(cotangent * term) in the raw product's first V columns."""
    if rows.start in plan.softmax:
        kept = plan.policy_logp.pop(rows.start), plan.softmax.pop(rows.start)
        terms, grad_logits = _gradient_of_token(plan, rows, logp, *kept, cotangent)
        return terms, plan.tempered(grad_logits)
    raw = plan.head.project(hidden)
    if plan.compiles_terms:
        leaf = raw.requires_grad_()
        with torch.enable_grad():
            terms = plan.terms_of_raw(rows, {**whole, str(Role.POLICY): leaf}, logp)
            (grad_raw,) = torch.autograd.grad(*_learnt(terms, leaf, cotangent))
        return {name: value.detach() for name, value in terms.items()}, grad_raw[:, : plan.head.vocab]
    if plan.head.is_plain:
        logits = plan.tempered(raw[:, : plan.head.vocab])
        terms, grad_logits = _gradient_in_logits(plan, logits, rows, logp, whole, cotangent)
        return terms, plan.tempered(grad_logits)
    with torch.enable_grad():
        logits = plan.head.finish(raw.requires_grad_())
    own = plan.tempered(logits.detach().clone())
    terms, grad_logits = _gradient_in_logits(plan, own, rows, logp, whole, cotangent)
    (grad_raw,) = torch.autograd.grad(logits, raw, plan.tempered(grad_logits))
    return terms, grad_raw[:, : plan.head.vocab]


def _learnt(
    terms: Mapping[str, Tensor], leaf: Tensor, cotangent: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """What `torch.autograd.grad` is given: the terms that depend on the policy, what they are differentiated in, and
    the derivative of the loss in each."""
    names = [name for name in cotangent if terms[name].requires_grad]
    return [terms[name] for name in names], leaf, [cotangent[name].to(terms[name].dtype) for name in names]


def _gradient_in_logits(
    plan: Plan,
    logits: Tensor,
    rows: slice,
    logp: dict[str, Tensor],
    whole: dict[str, Tensor],
    cotangent: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Overwrites `logits` (n, V). Through the log-softmax l of z: dz = dl - softmax(z) * sum(dl)."""
    if plan.policy_need is Need.LOGP:
        return _gradient_of_token(plan, rows, logp, *_softmax_of(plan, logits, rows), cotangent)
    leaf = logits.sub_(logits.logsumexp(-1, keepdim=True)).requires_grad_()
    with torch.enable_grad():
        terms = plan.terms_of(rows, logp, _pick(leaf, plan.ids[rows]), {**whole, Role.POLICY: leaf})
        (grad_leaf,) = torch.autograd.grad(*_learnt(terms, leaf, cotangent))
    total = grad_leaf.sum(-1, keepdim=True)
    terms = {name: value.detach() for name, value in terms.items()}
    return terms, grad_leaf.addcmul_(leaf.detach().exp_(), total, value=-1)


def _gradient_of_token(
    plan: Plan,
    rows: slice,
    logp: dict[str, Tensor],
    policy_logp: Tensor,
    softmax: Tensor,
    cotangent: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Where only the token's own log-probability is looked at; overwrites its `softmax` (n, V)."""
    leaf = policy_logp.requires_grad_()
    with torch.enable_grad():
        terms = plan.terms_of(rows, logp, leaf, {})
        (grad_leaf,) = torch.autograd.grad(*_learnt(terms, leaf, cotangent))
    grad = softmax.mul_(-grad_leaf.unsqueeze(-1))
    grad.scatter_add_(1, plan.ids[rows].unsqueeze(-1), grad_leaf.unsqueeze(-1))
    return {name: value.detach() for name, value in terms.items()}, grad


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
            add_product(self.weight[:vocab], narrow.t(), hidden)
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
    if torch.compiler.is_compiling():  # which puts nothing into memory that it is given
        numerators = (logits - largest).exp()
        total = numerators.sum(-1, keepdim=True)
        return picked - (largest + total.log()).squeeze(-1), numerators / total
    numerators = logits.sub_(largest).exp_()
    total = numerators.sum(-1, keepdim=True)
    return picked - (largest + total.log()).squeeze(-1), numerators.div_(total)


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """(n,) the entry of each row (n, V) that belongs to its token."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _wide(hidden: Tensor) -> torch.dtype:
    return hidden.dtype if hidden.dtype == torch.float64 else torch.float32
