"""The plain formula: whole logits (B, T, V) in, an objective's loss out. What the chunked engine must agree with."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, token_terms
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.bandit import Bandit
from aligndistil.objectives.base import Loss, Need, Objective, Role, TokenChunk
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.simpo import SimPO
from aligndistil.objectives.tdpo import TDPO

Logits = Mapping[Role, Tensor]

VARIANTS = [
    AlignDistil(reward="vanilla", r=3.0),
    AlignDistil(weight="constant", beta=0.08),
    AlignDistil(reward="vanilla", weight="constant", beta=0.08),
    DPO(beta=0.5, label_smoothing=0.1),
    SimPO(beta=2.5, simpo_gamma=1.4),
    TDPO(version=1),
    Bandit(literal=True),
]
"""Objectives that the registry's defaults leave out."""


def named(objective: Objective) -> str:
    """A test id: the objective and the fields that are not its defaults."""
    return "-".join([objective.name, *(f"{k}={v}" for k, v in objective.model_dump(exclude_defaults=True).items())])


def plain_terms(objective: Objective, batch: Batch, logits: Logits) -> dict[str, Tensor]:
    """Named terms (B, T): the logits at t - 1 speak about token t."""
    where = batch.response_BT
    ids = batch.ids_BT[where]
    logps = {role: torch.log_softmax(_predictions(z, batch), dim=-1) for role, z in logits.items()}
    logp = {role: values.gather(-1, ids[:, None]).squeeze(-1) for role, values in logps.items()}
    whole = {role: values for role, values in logps.items() if objective.needs[role] is Need.DISTRIBUTION}
    return _scattered(objective.token_terms(TokenChunk(ids, logp, whole)), where)


def plain_loss(objective: Objective, batch: Batch, logits: Logits) -> Loss:
    return objective.loss(batch, plain_terms(objective, batch, logits))


def chunked_loss(objective: Objective, batch: Batch, logits: Logits, chunk: int) -> Loss:
    """The same through the engine's primitive: the logits are hidden states, and the head is the identity."""
    where, known = batch.response_BT, objective.term_gradient(batch)
    vocab, dtype = logits[Role.POLICY].shape[-1], logits[Role.POLICY].dtype
    linear = nn.Linear(vocab, vocab, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(torch.eye(vocab, dtype=dtype))
    head = Head(linear, 1.0, None, vocab)
    frozen = {role: FrozenRole(_predictions(z, batch), head) for role, z in logits.items() if role is not Role.POLICY}
    flat = None if known is None else {name: value[where] for name, value in known.items()}
    plan = Plan(objective, head, batch.ids_BT[where], frozen, chunk, flat)
    return objective.loss(batch, _scattered(token_terms(plan, _predictions(logits[Role.POLICY], batch)), where))


def gradient_of(loss: Loss, leaf: Tensor) -> Tensor:
    """Of the mean over examples."""
    return torch.autograd.grad(loss.per_example.mean(), leaf)[0]


def _predictions(logits_BTV: Tensor, batch: Batch) -> Tensor:
    return logits_BTV[:, :-1][batch.response_BT[:, 1:]]


def _scattered(terms: Mapping[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(where.shape, dtype=v.dtype).masked_scatter(where, v) for name, v in terms.items()}


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


def random_logits(objective: Objective, batch: Batch, vocab: int = 11, seed: int = 0) -> dict[Role, Tensor]:
    """Of every role; the policy's require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.ids_BT.shape, vocab)
    logits = {role: torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for role in objective.needs}
    logits[Role.POLICY].requires_grad_()
    return logits
