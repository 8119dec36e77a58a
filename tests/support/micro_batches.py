"""Micro-batches of random rows with random outputs of models, what a step makes of them, and changes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.maths import Metric
from aligndistil.objectives.base import Loss, Need, Objective, Prepares, Role
from support.plain_formula import (
    Logits,
    critic_gradient_of,
    gradient_of,
    plain_loss,
    plain_preparation,
    scalar_terms,
    step_means,
)


def ragged_batch(kind: DataKind, examples: int = 3, vocab: int = 11, seed: int = 0) -> Batch:
    """Rows of 1 to 4 prompt and 1 to 6 response tokens; the response of the first is a single EOS (token 1)."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(2, vocab) for _ in range(count)]

    rows = []
    for example in range(examples):
        prompt = tokens(draw.randint(1, 4))
        for _ in range(2 if kind is DataKind.PAIRS else 1):
            length = draw.randint(1, 5) if rows else 0
            rows.append(Row(prompt, [*tokens(length), 1], label=example % 2 == 0))
    return collate(rows, kind, pad_id=0)


def random_logits(
    objective: Objective, batch: Batch, vocab: int = 11, seed: int = 0, needs: Mapping[str, Need] | None = None
) -> dict[str, Tensor]:
    """Of every role; those of the trained models require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = {}
    for role, need in (objective.needs if needs is None else needs).items():
        shape = batch.ids_BT.shape if need.is_scalar else (*batch.ids_BT.shape, vocab)
        logits[role] = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
        logits[role].requires_grad_(role in (Role.POLICY, Role.CRITIC))
    return logits


@dataclass(frozen=True)
class Work:
    """A micro-batch of a step: what the models say of it, and what they said of what the preparation looks at."""

    batch: Batch
    logits: Logits
    looked_at: Batch
    before: Logits = field(default_factory=dict)


def random_work(objective: Objective, examples: int = 3, seed: int = 0, moved: float = 0.3) -> Work:
    """On a rollout, policy and critic have `moved` since it was sampled; mismatched rows are rows of their own."""
    batch = ragged_batch(objective.data, examples, seed=seed)
    before = random_logits(objective, batch, seed=seed)
    if objective.prepares is Prepares.NOTHING:
        return Work(batch, before, batch)
    if objective.prepares is Prepares.MISMATCHED:
        looked_at = ragged_batch(objective.data, examples, seed=seed + 1)
        return Work(batch, before, looked_at, random_logits(objective, looked_at, seed=seed + 1))
    generator = torch.Generator().manual_seed(seed + 2)
    now = {
        role: (z + moved * torch.randn(z.shape, generator=generator, dtype=z.dtype)).detach().requires_grad_()
        for role, z in before.items()
        if role in objective.update_needs
    }
    return Work(batch, now, batch, before)


def found_in(objective: Objective, works: Sequence[Work]) -> list[dict[str, Tensor]]:
    """What the preparation of a step of these micro-batches has to say of each."""
    if objective.prepares is Prepares.NOTHING:
        return [{} for _ in works]
    parts = [plain_preparation(objective, work.looked_at, work.before) for work in works]
    means = step_means(parts)
    return [{**means, **part.terms} if objective.prepares is Prepares.ROLLOUT else means for part in parts]


def loss_of(objective: Objective, work: Work) -> Loss:
    """Of a step of one micro-batch."""
    return plain_loss(objective, work.batch, work.logits, found_in(objective, [work])[0])


def given(objective: Objective, batch: Batch, policy: Tensor) -> dict[str, Tensor]:
    """Terms of a loss beside those of its language models: random scalar heads, and what a preparation found.

    `policy` are the logits (B, T, V) of now; on a rollout they have moved a little since. In their dtype and place.
    """
    batch = batch.to("cpu")
    looked_at = batch if objective.prepares is not Prepares.MISMATCHED else ragged_batch(objective.data, seed=1)
    before = random_logits(objective, looked_at, policy.shape[-1], seed=1)
    if looked_at is batch:
        before[Role.POLICY] = policy.detach().cpu().double() + before[Role.POLICY].detach() / 20
    scalars = {role: need for role, need in objective.update_needs.items() if need.is_scalar}
    heads = scalar_terms(scalars, batch, random_logits(objective, batch, seed=2, needs=scalars))
    terms = {**found_in(objective, [Work(batch, {}, looked_at, before)])[0], **heads}
    return {name: value.detach().to(policy) for name, value in terms.items()}


def changed(work: Work, of_batch: Callable[[Batch], Batch], of_logits: Callable[[Logits, Batch], Logits]) -> Work:
    """The same done to a micro-batch and to what its preparation looks at; trained models get new leaves."""
    looked_at = of_batch(work.looked_at)
    batch = looked_at if work.looked_at is work.batch else of_batch(work.batch)
    before = of_logits({role: z.detach() for role, z in work.before.items()}, work.looked_at)
    logits = of_logits({role: z.detach() for role, z in work.logits.items()}, work.batch)
    for role in (Role.POLICY, Role.CRITIC):
        if role in logits:
            logits[role].requires_grad_()
    return Work(batch, logits, looked_at, before)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return Batch(batch.kind, batch.ids_BT[rows], batch.attention_BT[rows], batch.response_BT[rows], batch.label_B[rows])


def examples_of(batch: Batch) -> list[list[int]]:
    size = batch.rows // batch.examples
    return [list(range(first, first + size)) for first in range(0, batch.rows, size)]


def take(work: Work, rows: list[int]) -> Work:
    """Of the leaves as they are."""
    looked_at = rows_of(work.looked_at, rows)
    batch = looked_at if work.looked_at is work.batch else rows_of(work.batch, rows)
    logits, before = ({role: z[rows] for role, z in of.items()} for of in (work.logits, work.before))
    return Work(batch, logits, looked_at, before)


def read_at(need: Need, batch: Batch) -> Tensor:
    """(B, T) where a model's output is looked at: before each response token, or at it for a score."""
    if need in (Need.SCORE, Need.NORMALIZED_SCORE):
        return batch.response_BT
    return torch.cat([batch.response_BT[:, 1:], torch.zeros(batch.rows, 1, dtype=torch.bool)], dim=1)


def gradients(loss: Loss, logits: Logits) -> dict[str, Tensor]:
    """Of the mean losses of policy and critic, each in its own outputs."""
    found = {Role.POLICY: gradient_of(loss, logits[Role.POLICY])}
    if loss.critic_per_example is not None:
        found[Role.CRITIC] = critic_gradient_of(loss, logits[Role.CRITIC])
    return found


def losses_of(loss: Loss) -> dict[str, Tensor]:
    critic = {} if loss.critic_per_example is None else {Role.CRITIC: loss.critic_per_example.detach()}
    return {Role.POLICY: loss.per_example.detach(), **critic}


def outcome(objective: Objective, work: Work) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of the examples, and the gradients of their means."""
    loss = loss_of(objective, work)
    return losses_of(loss), gradients(loss, work.logits)


def assert_added_up(parts: list[dict[str, Metric]], whole: dict[str, Metric]) -> None:
    assert all(part.keys() == whole.keys() for part in parts)
    for name, (total, count) in whole.items():
        torch.testing.assert_close(sum(part[name].total for part in parts), total, msg=name)
        torch.testing.assert_close(sum(part[name].count for part in parts), count, msg=name)
