"""The objective's own terms of each token, each model's probabilities of the likeliest tokens, and the token's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.objectives.base import Need, Objective, Prepares, Role, TokenChunk

TARGET = "target"
"""Beside the names of roles: the distribution that the policy is pulled towards."""
_ROUNDING = 0.05
"""The share of a loss that may be lost to rounding: the divergence of two nearly equal distributions in float32."""


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What is known of the n response tokens of one row."""

    terms: dict[str, list[float]]
    """The objective's, and `log_ratio`, log policy - log reference, where it has a reference."""
    candidates: list[list[int]]
    """Of each token: the likeliest tokens of every distribution together, and the token itself."""
    probabilities: dict[str, list[list[float]]]
    """Of each distribution, in the order of `candidates`."""
    ranks: dict[str, list[int]]
    """How many tokens the distribution holds for likelier than the one that came; 0 is the likeliest."""
    loss: list[float] | None
    """What each token adds to the loss of the response; None where the loss is no sum over tokens."""


@dataclass(slots=True)
class _Record:
    """What went through `token_terms`, chunk by chunk."""

    top: int
    candidates: list[Tensor] = field(default_factory=list)
    probabilities: dict[str, list[Tensor]] = field(default_factory=dict)
    ranks: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, chunk: TokenChunk, distributions: Mapping[str, Tensor]) -> None:
        own = chunk.ids.unsqueeze(-1)
        tops = [logps.topk(self.top, dim=-1).indices for logps in distributions.values()]
        candidates = torch.cat([own, *tops], dim=-1)
        self.candidates.append(candidates.cpu())
        for name, logps in distributions.items():
            self.probabilities.setdefault(name, []).append(logps.gather(-1, candidates).exp().cpu())
            ahead = (logps > logps.gather(-1, own)).sum(-1)
            self.ranks.setdefault(name, []).append(ahead.cpu())


class _Recording(Objective):
    """An objective, and a record of the distributions it was given; every model is read as a distribution."""

    data = DataKind.RESPONSES
    paper = ""
    name: Literal["recording"] = "recording"
    _objective: Objective = PrivateAttr()
    _record: _Record = PrivateAttr()

    @classmethod
    def of(cls, objective: Objective, record: _Record) -> _Recording:
        recording = cls()
        recording._objective, recording._record = objective, record
        return recording

    @property
    def needs(self) -> dict[str, Need]:
        models = [role for role, need in self._objective.needs.items() if not need.is_scalar]
        return dict.fromkeys(models, Need.DISTRIBUTION)

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        objective = self._objective
        frozen = [role for role in self.needs if role != Role.POLICY]
        distributions = {role: chunk.logps[role] for role in frozen}
        target = objective.target_logps(chunk)
        if target is not None:
            distributions[TARGET] = target
        distributions[Role.POLICY] = chunk.logps[Role.POLICY]
        self._record.add(chunk, distributions)
        terms = {} if objective.prepares is Prepares.NOTHING else objective.preparation_terms(chunk)
        terms = terms | objective.token_terms(chunk)
        if Role.REFERENCE in chunk.logp:
            terms["log_ratio"] = chunk.logp[Role.POLICY] - chunk.logp[Role.REFERENCE]
        return terms


class Viewer:
    """Reads responses with a trained policy and the frozen models of its objective."""

    def __init__(
        self,
        objective: Objective,
        policy: PreTrainedModel,
        frozen: Mapping[str, PreTrainedModel],
        vocab: int,
        top: int = 6,
        temperature: float = 1.0,
    ) -> None:
        """`top` tokens of each distribution are kept; all models are on one device.

        `temperature` is that of the policy that the objective trained.
        """
        self._objective = objective
        self._policy = Policy(policy, vocab).eval()
        self._frozen = {role: FrozenModel(model, vocab) for role, model in frozen.items()}
        self._device = policy.device
        self._top, self._temperature = min(top, vocab), temperature

    @torch.no_grad()
    def values(self, row: Row) -> TokenValues:
        """The values of each response token of a row, through the projection that training uses."""
        batch = collate([row], DataKind.RESPONSES, pad_id=0).to(self._device)
        record = _Record(self._top)
        recording = _Recording.of(self._objective, record)
        frozen = {role: model.read(batch) for role, model in self._frozen.items()}
        terms_BT = self._policy(batch, recording, frozen, temperature=self._temperature)
        loss = loss_by_token(self._objective, batch, terms_BT)
        where = batch.response_BT
        candidates, columns = _distinct(torch.cat(record.candidates).tolist())
        probabilities = {
            name: [[row[c] for c in kept] for row, kept in zip(torch.cat(parts).tolist(), columns, strict=True)]
            for name, parts in record.probabilities.items()
        }
        return TokenValues(
            terms={name: value[where].tolist() for name, value in terms_BT.items()},
            candidates=candidates,
            probabilities=probabilities,
            ranks={name: torch.cat(parts).tolist() for name, parts in record.ranks.items()},
            loss=None if loss is None else loss[where].tolist(),
        )


def _distinct(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Each row without repetitions, and the columns that were kept."""
    columns = [[c for c, token in enumerate(row) if row.index(token) == c] for row in rows]
    return [[row[c] for c in kept] for row, kept in zip(rows, columns, strict=True)], columns


def loss_by_token(objective: Objective, batch: Batch, terms: Mapping[str, Tensor]) -> Tensor | None:
    """(B, T) the parts of the loss of each response that belong to its tokens; None where there are no such parts.

    A loss has parts when it is linear in its terms: then each token adds derivative x term. A preference loss is not,
    and neither is a policy gradient, whose value means nothing; losses that read more than `terms` are left out.
    """
    scalar = any(need.is_scalar for need in objective.needs.values())
    if objective.data is not DataKind.RESPONSES or objective.prepares is not Prepares.NOTHING or scalar:
        return None
    with torch.enable_grad():
        leaves = {name: value.detach().clone().requires_grad_() for name, value in terms.items()}
        loss = objective.loss(batch, leaves).per_example.sum()
        doubled = objective.loss(batch, {name: 2 * value.detach() for name, value in terms.items()}).per_example.sum()
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    used = [(slope, value) for slope, value in zip(slopes, leaves.values(), strict=True) if slope is not None]
    parts = torch.stack([slope * value.detach() for slope, value in used]).sum(0)
    linear = torch.allclose(doubled, 2 * loss, rtol=1e-3) and torch.allclose(parts.sum(), loss, rtol=1e-3)
    # A divergence that rounds to a little less than 0 is no negative part.
    positive = float(loss.detach()) > 0 and float(parts.clamp(max=0).sum()) >= -_ROUNDING * float(loss.detach())
    return parts.clamp(min=0) if linear and positive else None
