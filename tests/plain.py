"""The plain formula: whole outputs of models in, an objective's loss out. What the chunked engine must agree with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, token_terms
from aligndistil.objectives import registry
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.bandit import Bandit
from aligndistil.objectives.base import (
    Loss,
    Need,
    Objective,
    Prepared,
    Prepares,
    Role,
    State,
    TokenChunk,
    scalar_term,
)
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.kto import KTO
from aligndistil.objectives.ppo import PPO
from aligndistil.objectives.rto import RTO
from aligndistil.objectives.simpo import SimPO
from aligndistil.objectives.tdpo import TDPO

Logits = Mapping[str, Tensor]
"""What each model says at each position: logits (B, T, V), or the numbers (B, T) of a scalar head."""

VARIANTS = [
    AlignDistil(reward="vanilla", r=3.0),
    AlignDistil(weight="constant", beta=0.08),
    AlignDistil(reward="vanilla", weight="constant", beta=0.08),
    DPO(beta=0.5, label_smoothing=0.1),
    SimPO(beta=2.5, simpo_gamma=1.4),
    TDPO(version=1),
    Bandit(literal=True),
    KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    PPO(kl_coef=0.2, kl_target=6.0, gamma=0.9, reward_clip=None, normalize_reward=True),
    RTO(version="v3", token_reward_clip=0.3, reward_clip=1.0),
]
"""Objectives that the registry's defaults leave out."""

EVERY_OBJECTIVE = [*(cls.example() for cls in registry().values()), *VARIANTS]


def named(objective: Objective) -> str:
    """A test id: the objective and the fields that are not its defaults."""
    return "-".join([objective.name, *(f"{k}={v}" for k, v in objective.model_dump(exclude_defaults=True).items())])


def language_roles(objective: Objective) -> list[str]:
    """Those whose distributions the loss reads, the policy first; none where a scalar head is trained alone."""
    return [role for role, need in objective.update_needs.items() if not need.is_scalar]


def plain_terms(objective: Objective, batch: Batch, logits: Logits) -> dict[str, Tensor]:
    """Named terms (B, T) of the loss, but for those that are prepared."""
    return _read(objective.token_terms, objective.update_needs, batch, logits)


def plain_loss(objective: Objective, batch: Batch, logits: Logits, found: Mapping[str, Tensor] | None = None) -> Loss:
    """`found` is what the preparation of the step has to say of this batch."""
    return objective.loss(batch, {**plain_terms(objective, batch, logits), **(found or {})})


@torch.no_grad()
def plain_preparation(objective: Objective, batch: Batch, logits: Logits, state: State | None = None) -> Prepared:
    """`state` is that of the first step, unless it is given."""
    terms = preparation_terms(objective, batch, logits)
    return objective.prepare(batch, terms, objective.initial_state() if state is None else state)


def preparation_terms(objective: Objective, batch: Batch, logits: Logits) -> dict[str, Tensor]:
    """Named terms (B, T) of the preparation."""
    return _read(objective.preparation_terms, objective.needs, batch, logits)


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
    where = batch.response_BT
    vocab, dtype = logits[Role.POLICY].shape[-1], logits[Role.POLICY].dtype
    linear = nn.Linear(vocab, vocab, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(torch.eye(vocab, dtype=dtype))
    head = Head(linear, 1.0, None, vocab)
    read = [role for role, need in needs.items() if not need.is_scalar and role != Role.POLICY]
    frozen = {role: FrozenRole(_predictions(logits[role], batch), head) for role in read}
    flat = None if known is None else {name: value[where] for name, value in known.items()}
    plan = Plan(objective, head, batch.ids_BT[where], frozen, chunk, flat, preparing=preparing)
    terms = _scattered(token_terms(plan, _predictions(logits[Role.POLICY], batch)), where)
    return {**_scalars(needs, batch, logits), **terms}


def gradient_of(loss: Loss, leaf: Tensor) -> Tensor:
    """Of the mean over examples."""
    return torch.autograd.grad(loss.per_example.mean(), leaf)[0]


def critic_gradient_of(loss: Loss, leaf: Tensor) -> Tensor:
    """Of the mean over examples."""
    assert loss.critic_per_example is not None
    return torch.autograd.grad(loss.critic_per_example.mean(), leaf)[0]


def _read(
    terms_of: Callable[[TokenChunk], dict[str, Tensor]], needs: Mapping[str, Need], batch: Batch, logits: Logits
) -> dict[str, Tensor]:
    where = batch.response_BT
    ids = batch.ids_BT[where]
    read = [role for role, need in needs.items() if not need.is_scalar]
    logps = {role: torch.log_softmax(_predictions(logits[role], batch), dim=-1) for role in read}
    logp = {role: values.gather(-1, ids[:, None]).squeeze(-1) for role, values in logps.items()}
    whole = {role: values for role, values in logps.items() if needs[role] is Need.DISTRIBUTION}
    return {**_scattered(terms_of(TokenChunk(ids, logp, whole)), where), **_scalars(needs, batch, logits)}


def _scalars(needs: Mapping[str, Need], batch: Batch, logits: Logits) -> dict[str, Tensor]:
    """A value is what is said before the token, a score what is said after it."""
    where = batch.response_BT
    return _scattered(
        {
            scalar_term(role, need): _predictions(logits[role], batch) if need is Need.VALUE else logits[role][where]
            for role, need in needs.items()
            if need.is_scalar
        },
        where,
    )


def _predictions(outputs: Tensor, batch: Batch) -> Tensor:
    """What stands at t - 1 speaks about token t."""
    return outputs[:, :-1][batch.response_BT[:, 1:]]


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
    heads = _scalars(scalars, batch, random_logits(objective, batch, seed=2, needs=scalars))
    terms = {**found_in(objective, [Work(batch, {}, looked_at, before)])[0], **heads}
    return {name: value.detach().to(policy) for name, value in terms.items()}
