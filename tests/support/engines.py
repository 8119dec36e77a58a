"""Engines of toy models, and the plain loop they must agree with: full logits, one process, torch's own optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aligndistil import recipe
from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.models import Bases, load_model
from aligndistil.objectives import registry
from aligndistil.objectives.base import Need, Objective, Role, TokenChunk
from aligndistil.rollout import LoadedModel
from support.models import build_tokenizer

VOCAB = 96
CONSTANT = {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_ratio": 0.0}
GOALS = {"dpo": {"beta": 0.5}, "aligndistil": {"r": 5.0}}


def objective(name: str, **fields: Any) -> Objective:
    return registry()[name].model_validate(fields)


def examples(count: int, kind: DataKind, seed: int = 0) -> list[list[Row]]:
    """Ragged, from 1 to 12 response tokens."""
    draw = random.Random(seed)

    def words(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(5, VOCAB) for _ in range(draw.randint(shortest, longest))]

    made = []
    for _ in range(count):
        prompt = words(1, 6)
        made.append([Row(prompt, [*words(0, 11), 1]) for _ in range(2 if kind is DataKind.PAIRS else 1)])
    return made


def batch_of(some: Sequence[Sequence[Row]], kind: DataKind) -> Batch:
    return collate([row for rows in some for row in rows], kind, pad_id=0)


def section(path: str, **fields: Any) -> recipe.Model:
    return recipe.Model.model_validate({"path": path, "dtype": "float32", **fields})


def make_engine(
    goal: Objective,
    policy: str,
    frozen: Sequence[str],
    processes: Processes,
    *,
    train: dict[str, Any],
    engine: dict[str, Any],
    model: dict[str, Any] | None = None,
    steps: int = 4,
    critic: str | None = None,
    reward: Any = None,
    temperature: float = 1.0,
) -> Engine:
    """`frozen` are the models of the roles the objective needs, in its order, but for the critic."""
    roles = [role for role in goal.needs if role not in (Role.POLICY, Role.CRITIC)]
    named = {role: path for role, path in zip(roles, frozen, strict=True) if path}
    options = section(policy, **(model or {}))

    bases = Bases(options)

    def load(role: str, path: str, trained: bool) -> Any:
        return (bases.scalar_model if goal.needs[role].is_scalar else bases.language_model)(path, trained=trained)

    return Engine(
        load(Role.POLICY, policy, True),
        {role: load(role, path, False) for role, path in named.items()},
        goal,
        train=recipe.Train.model_validate(train),
        settings=recipe.Engine.model_validate(engine),
        processes=processes,
        total_steps=steps,
        vocab=VOCAB,
        critic=None if critic is None else load(Role.CRITIC, critic, True),
        reward=reward,
        temperature=temperature,
    )


def take_step(engine: Engine, some: Sequence[Sequence[Row]], micro: int) -> tuple[float, float, float]:
    """One optimizer step on these examples of all processes: mean loss, gradient norm and learning rate."""
    total = torch.zeros((), dtype=torch.float64)
    per_rank = len(some) // engine.processes.world
    mine = some[engine.processes.rank * per_rank : (engine.processes.rank + 1) * per_rank]
    for start in range(0, per_rank, micro):
        batch = batch_of(mine[start : start + micro], engine.objective.data)
        loss = engine.loss(batch, {})
        engine.backward(loss, examples=len(some), last=start + micro >= per_rank)
        total += loss.per_example.detach().double().sum().cpu()
    metrics = engine.step()
    return float(engine.processes.sum(total)) / len(some), metrics["grad_norm"], metrics["learning_rate"]


def plain_loss(goal: Objective, models: dict[str, Any], batch: Batch) -> Tensor:
    """(E,) from log-softmax of all logits of all models."""
    mask = batch.response_BT[:, 1:]
    ids = batch.ids_BT[:, 1:][mask]
    logps: dict[str, Tensor] = {}
    for role, model in models.items():
        logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1][mask]
        logps[role] = torch.log_softmax(logits.float() if role == Role.POLICY else logits.float().detach(), -1)
    logp = {role: values.gather(-1, ids[:, None]).squeeze(-1) for role, values in logps.items()}
    whole = {role: logps[role] for role, need in goal.needs.items() if need is Need.DISTRIBUTION}
    terms = goal.token_terms(TokenChunk(ids, logp, whole))
    blank = torch.zeros(batch.response_BT.shape)
    spread = {name: blank.masked_scatter(batch.response_BT, value) for name, value in terms.items()}
    return goal.loss(batch, spread).per_example


def plain_models(goal: Objective, policy: str, frozen: Sequence[str]) -> dict[str, Any]:
    roles = [role for role in goal.needs if role != Role.POLICY]
    named = {Role.POLICY: policy, **dict(zip(roles, frozen, strict=True))}
    return {role: load_model(path, section(path), trained=role == Role.POLICY) for role, path in named.items()}


def plain_training(
    goal: Objective,
    policy: str,
    frozen: Sequence[str],
    steps: Sequence[Sequence[Sequence[Row]]],
    learning_rate: float,
    max_norm: float = 1.0,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of AdamW with a constant learning rate."""
    models = plain_models(goal, policy, frozen)
    parameters = list(models[Role.POLICY].parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for some in steps:
        optimizer.zero_grad()
        loss = plain_loss(goal, models, batch_of(some, goal.data)).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, dict(models[Role.POLICY].named_parameters())


def steps_of(name: str, count: int = 4, size: int = 4) -> list[Any]:
    return [examples(size, objective(name).data, seed) for seed in range(count)]


def models_of(name: str, folder: Callable[..., str], tied: bool = True) -> tuple[str, list[str]]:
    frozen = [folder(seed=seed, tied=tied) for seed in (1, 2)][: 1 if name == "dpo" else 2]
    return folder(seed=0, tied=tied), frozen


def trained(
    name: str, models: tuple[str, list[str]], processes: Processes, engine: dict[str, Any], **more: Any
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    micro, size = more.pop("micro", 4), more.pop("size", 4)
    train = {**CONSTANT, "batch_size": size, "micro_batch_size": micro, **more.pop("train", {})}
    made = make_engine(objective(name, **GOALS[name]), *models, processes, train=train, engine=engine, **more)
    taken = [take_step(made, some, micro) for some in steps_of(name, size=size)]
    state = made.state_dict()
    made.close()
    return [loss for loss, _, _ in taken], [norm for _, norm, _ in taken], state


def sampler(engine: Engine, synced: bool = False) -> LoadedModel:
    return LoadedModel(
        engine.model, build_tokenizer(), frozenset({1}), 96, batch_size=4, whole=engine.generating, synced=synced
    )
