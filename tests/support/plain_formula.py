"""The plain formula: whole outputs of models in, an objective's loss out. What the chunked engine must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from aligndistil.batch import Batch
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, token_terms
from aligndistil.maths import Metric
from aligndistil.objectives.base import Loss, Need, Objective, Prepared, Role, State, TokenChunk, scalar_term

Logits = Mapping[str, Tensor]
"""What each model says at each position: logits (B, T, V), or the numbers (B, T) of a scalar head."""


def plain_terms(objective: Objective, batch: Batch, logits: Logits, temperature: float = 1.0) -> dict[str, Tensor]:
    """Named terms (B, T) of the loss, but for those that are prepared."""
    return _read(objective.token_terms, objective.update_needs, batch, logits, temperature)


def plain_loss(
    objective: Objective,
    batch: Batch,
    logits: Logits,
    found: Mapping[str, Tensor] | None = None,
    temperature: float = 1.0,
) -> Loss:
    """`found` is what the preparation of the step has to say of this batch."""
    return objective.loss(batch, {**plain_terms(objective, batch, logits, temperature), **(found or {})})


@torch.no_grad()
def plain_preparation(
    objective: Objective, batch: Batch, logits: Logits, state: State | None = None, temperature: float = 1.0
) -> Prepared:
    """`state` is that of the first step, unless it is given."""
    terms = preparation_terms(objective, batch, logits, temperature)
    return objective.prepare(batch, terms, objective.initial_state() if state is None else state)


def preparation_terms(
    objective: Objective, batch: Batch, logits: Logits, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Named terms (B, T) of the preparation."""
    return _read(objective.preparation_terms, objective.needs, batch, logits, temperature)


def means(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What a training line says; a metric that counts nothing, as of the desirable responses where there are none, is
    left out.
    """
    return {name: float(total / count) for name, (total, count) in metrics.items() if count}


def step_means(parts: Iterable[Prepared]) -> dict[str, Tensor]:
    """The means of what was measured on all micro-batches of a step."""
    totals: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, (total, count) in part.metrics.items():
            old = totals.get(name, [torch.zeros(()), torch.zeros(())])
            totals[name] = [old[0] + total, old[1] + count]
    return {name: total / count for name, (total, count) in totals.items() if count}


def chunked_loss(
    objective: Objective, batch: Batch, logits: Logits, chunk: int, found: Mapping[str, Tensor] | None = None
) -> Loss:
    """The same through the engine's primitive: the logits are hidden states, and the head is the identity."""
    known = loss_direction(objective, batch, found or {})
    return objective.loss(batch, {**_chunked(objective, batch, logits, chunk, known=known), **(found or {})})


@torch.no_grad()
def chunked_preparation(objective: Objective, batch: Batch, logits: Logits, chunk: int) -> Prepared:
    """The preparation of the first step, through the engine's primitive."""
    terms = _chunked(objective, batch, logits, chunk, preparing=True, known=None)
    return objective.prepare(batch, terms, objective.initial_state())


def _chunked(
    objective: Objective,
    batch: Batch,
    logits: Logits,
    chunk: int,
    *,
    known: Mapping[str, Tensor] | None,
    preparing: bool = False,
) -> dict[str, Tensor]:
    needs = objective.needs if preparing else objective.update_needs
    mask = batch.response_BT
    vocab, dtype = logits[Role.POLICY].shape[-1], logits[Role.POLICY].dtype
    linear = nn.Linear(vocab, vocab, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(torch.eye(vocab, dtype=dtype))
    head = Head(linear, 1.0, None, vocab)
    read = [role for role, need in needs.items() if not need.is_scalar and role != Role.POLICY]
    frozen = {role: FrozenRole(_predictions(logits[role], batch), head) for role in read}
    flat = None if known is None else {name: value[mask] for name, value in known.items()}
    plan = Plan(objective, head, batch.ids_BT[mask], frozen, chunk, flat, preparing=preparing)
    terms = _scattered(token_terms(plan, _predictions(logits[Role.POLICY], batch)), mask)
    return {**scalar_terms(needs, batch, logits), **terms}


def gradient_of(loss: Loss, leaf: Tensor) -> Tensor:
    """Of the mean over examples."""
    return torch.autograd.grad(loss.per_example.mean(), leaf)[0]


def critic_gradient_of(loss: Loss, leaf: Tensor) -> Tensor:
    """Of the mean over examples."""
    assert loss.critic_per_example is not None
    return torch.autograd.grad(loss.critic_per_example.mean(), leaf)[0]


def _read(
    terms_of: Callable[[TokenChunk], dict[str, Tensor]],
    needs: Mapping[str, Need],
    batch: Batch,
    logits: Logits,
    temperature: float,
) -> dict[str, Tensor]:
    mask = batch.response_BT
    ids = batch.ids_BT[mask]
    read = [role for role, need in needs.items() if not need.is_scalar]
    z = {role: _predictions(logits[role], batch) for role in read}
    own, logps = ({role: (values / t).log_softmax(-1) for role, values in z.items()} for t in (1.0, temperature))
    own_logp, logp = (
        {role: values.gather(-1, ids[:, None]).squeeze(-1) for role, values in of.items()} for of in (own, logps)
    )
    whole = {role: values for role, values in logps.items() if needs[role] is Need.DISTRIBUTION}
    chunk = TokenChunk(ids, logp, whole, own_logp)
    return {**_scattered(terms_of(chunk), mask), **scalar_terms(needs, batch, logits)}


def scalar_terms(needs: Mapping[str, Need], batch: Batch, logits: Logits) -> dict[str, Tensor]:
    """A value is what is said before the token, a score what is said after it."""
    mask = batch.response_BT
    return _scattered(
        {
            scalar_term(role, need): _predictions(logits[role], batch) if need is Need.VALUE else logits[role][mask]
            for role, need in needs.items()
            if need.is_scalar
        },
        mask,
    )


def _predictions(outputs: Tensor, batch: Batch) -> Tensor:
    """What stands at t - 1 speaks about token t."""
    return outputs[:, :-1][batch.response_BT[:, 1:]]


def _scattered(terms: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(mask.shape, dtype=v.dtype).masked_scatter(mask, v) for name, v in terms.items()}
