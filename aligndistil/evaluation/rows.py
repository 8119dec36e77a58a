"""What models say of whole rows, prompt and response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.divergence import LogProbability
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.engine.scalar import Scorer
from aligndistil.maths import sum_tokens
from aligndistil.objectives.base import Objective


@torch.no_grad()
def read_rows(
    rows: Sequence[Row],
    read: Callable[[Batch], Tensor],
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """What `read` finds, (B, K) of a batch: K numbers of each row, in the order of `rows`.

    `on_progress` is told how many more are done.
    """
    # Rows of about the same length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].response_ids))
    found: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], DataKind.RESPONSES, pad_token_id).to(device)
        for i, values in zip(chosen, read(batch).tolist(), strict=True):
            found[i] = values
        on_progress(len(chosen))
    return found


def summed_terms(objective: Objective, policy: Policy, frozen: Mapping[str, FrozenModel], batch: Batch) -> Tensor:
    """(B, K) each term of `objective`, summed over the response tokens."""
    terms = policy(batch, objective, {role: model.read(batch) for role, model in frozen.items()})
    return torch.stack([sum_tokens(values_BT, batch.response_BT) for values_BT in terms.values()], -1)


def log_probabilities(policy: Policy, batch: Batch) -> Tensor:
    """(B, 1) of each response."""
    return summed_terms(LogProbability(), policy, {}, batch)


def last_scores(model: Scorer, batch: Batch) -> Tensor:
    """(B, 1) the score at the last token of each row."""
    return model.scores(batch).gather(1, batch.attention_BT.sum(-1, keepdim=True) - 1)
