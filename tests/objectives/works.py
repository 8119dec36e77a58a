"""What the tests of all objectives do to a micro-batch, and what they look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from plain import Logits, Work, critic_gradient_of, gradient_of, loss_of
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.maths import Metric
from aligndistil.objectives.base import Loss, Need, Objective, Role


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
