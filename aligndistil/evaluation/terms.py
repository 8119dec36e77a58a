"""What models say of whole responses: sums over tokens, through the same chunked projection as the objectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.engine.scalar import Scorer
from aligndistil.maths import kl_divergence, sum_tokens
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk


class Divergence(Objective):
    """KL(policy || other) of each token, over the whole vocabulary, for each of `others`; terms are named by role."""

    data = DataKind.RESPONSES
    paper = "Zhang et al. 2025, arXiv 2503.02832, Table 3"
    name: Literal["divergence"] = "divergence"
    others: tuple[str, ...] = (Role.REFERENCE,)

    @property
    def needs(self) -> dict[str, Need]:
        return dict.fromkeys((Role.POLICY, *self.others), Need.DISTRIBUTION)

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        policy = chunk.logps[Role.POLICY]
        return {role: kl_divergence(policy, chunk.logps[role]) for role in self.others}


class LogProbability(Objective):
    """log policy(token)."""

    data = DataKind.RESPONSES
    paper = "Rafailov et al. 2023, arXiv 2305.18290, Eq. 5"
    name: Literal["log_probability"] = "log_probability"

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}


def batches_by_length(rows: Sequence[Row], size: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows of about the same length, each with the places of its rows; little of them is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].response_ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, collate([rows[i] for i in places], DataKind.RESPONSES, pad_id)


@torch.no_grad()
def sequence_sums(
    measure: Objective,
    policy: Policy,
    others: Mapping[str, FrozenModel],
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Each term of `measure`, summed over the response tokens of each row, in the order of the rows."""
    sums: dict[str, list[float]] = {}
    for places, rows_of_batch in batches_by_length(rows, batch_size, pad_id):
        batch = rows_of_batch.to(device)
        terms = policy(batch, measure, {role: other.read(batch) for role, other in others.items()})
        for name, values in terms.items():
            column = sums.setdefault(name, [0.0] * len(rows))
            for place, value in zip(places, sum_tokens(values, batch.response_BT).tolist(), strict=True):
                column[place] = value
    return sums


@torch.no_grad()
def response_scores(
    scorer: Scorer, rows: Sequence[Row], *, batch_size: int, pad_id: int, device: torch.device
) -> list[float]:
    """The score at the last response token of each row, found by its length, in the order of the rows."""
    found = [0.0] * len(rows)
    for places, batch in batches_by_length(rows, batch_size, pad_id):
        last_B = torch.tensor([len(rows[i].prompt_ids) + len(rows[i].response_ids) - 1 for i in places], device=device)
        scores_BT = scorer.scores(batch.to(device))
        for place, value in zip(places, scores_BT.gather(1, last_B.unsqueeze(1)).squeeze(1).tolist(), strict=True):
            found[place] = value
    return found
