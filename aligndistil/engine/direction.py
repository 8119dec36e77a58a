"""The derivative of a loss in its terms, where it is known before the models are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk, scalar_term

_WORDS = 4
"""Tokens of the vocabulary that the random distributions are over: terms are numbers of a token, whatever its size."""
_PARALLEL = 1e-9
"""How far the cosine of two derivatives in float64 may be from 1 or -1."""


def loss_direction(objective: Objective, batch: Batch, prepared: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """(B, T) derivatives of the summed losses in the terms, up to one factor common to all; None where there is none.

    The loss is differentiated at two random points. A loss that is linear in its terms (SFT, AlignDistil) has the same
    derivative at both, and one that is a function of a single weighted sum of them (DPO on one pair) has parallel
    ones: the sum's weights. The factor is then all that the models still have to say. Two points are no proof: who
    uses the direction compares it with the derivative that arrives (`token_terms`). An objective that the random
    distributions can't be given to (it reads an entry of the vocabulary that they don't have) has no direction that is
    known: the models will say. On the CPU, without the generator of the run.
    """
    if objective.update_needs[Role.POLICY].is_scalar:
        return None
    batch = batch.to("cpu")
    prepared = {name: value.cpu() for name, value in prepared.items()}
    try:
        first, second = (_derivatives(objective, batch, prepared, seed) for seed in (0, 1))
    except (RuntimeError, IndexError, KeyError, ValueError):  # a fault of the objective's own shows with the models
        return None
    if first.keys() != second.keys() or not first:
        return None
    one, other = (torch.cat([value.double().flatten() for value in found.values()]) for found in (first, second))
    norms = one.norm() * other.norm()
    if not (torch.isfinite(norms) and norms > 0 and abs(float(one @ other / norms)) > 1 - _PARALLEL):
        return None
    return first


def _derivatives(objective: Objective, batch: Batch, prepared: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Of the summed losses in each term that they depend on, where models say something random."""
    generator = torch.Generator().manual_seed(seed)
    mask, needs = batch.response_BT, objective.update_needs
    tokens = int(mask.sum())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(_WORDS, (tokens,), generator=generator)
    logps = {role: draw(tokens, _WORDS).log_softmax(-1) for role, need in needs.items() if not need.is_scalar}
    logp = {role: values.gather(-1, ids[:, None]).squeeze(-1) for role, values in logps.items()}
    whole = {role: values for role, values in logps.items() if needs[role] is Need.DISTRIBUTION}
    blank = torch.zeros(mask.shape, dtype=torch.float64)
    scalars = {scalar_term(role, need): draw(*mask.shape) * mask for role, need in needs.items() if need.is_scalar}
    with torch.enable_grad():
        terms = {
            name: blank.masked_scatter(mask, value.detach()).requires_grad_()
            for name, value in objective.token_terms(TokenChunk(ids, logp, whole)).items()
        }
        loss = objective.loss(batch, {**terms, **scalars, **prepared}).per_example.sum()
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, list(terms.values()), allow_unused=True)
    return {name: value for name, value in zip(terms, found, strict=True) if value is not None}
