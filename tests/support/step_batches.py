"""Step batches on the engine, and in plain torch, with which it must agree: whole outputs, torch's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligndistil.batch import Batch, Row
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import gathered
from aligndistil.models import load_model, load_scalar_model
from aligndistil.objectives.base import Objective, Prepares, Role
from aligndistil.training.batches import StepBatch
from aligndistil.training.checkpoints import LoopState
from support.engines import batch_of, examples, make_engine, objective, section
from support.loop import Recorded, run, step_batch
from support.plain_formula import plain_loss, plain_preparation, step_means

ModelFolder = Callable[..., str]
Folders = Mapping[str, str]
Examples = Sequence[Sequence[Row]]
ONE_STEP = [[0, 1, 2, 3]]
TWO_PASSES = [[0, 1], [2, 3], [2, 1], [0, 3]]
"""Optimizer steps on a step batch, each of one micro-batch for each of two processes."""


@dataclass(frozen=True)
class Case:
    """What is trained on eight examples a step batch, in four micro-batches."""

    goal: Objective
    updates: list[list[int]]
    step_batches: int
    policy: str
    frozen: list[str]
    critic: str | None = None
    rates: tuple[float, float] = (1e-3, 3e-3)
    max_norm: float = 0.5
    temperature: float = 1.0

    @property
    def data(self) -> list[list[list[Row]]]:
        return [examples(8, self.goal.data, seed) for seed in range(self.step_batches)]

    @property
    def passes(self) -> int:
        return 2 if self.updates is TWO_PASSES else 1

    @property
    def steps(self) -> int:
        return self.step_batches * len(self.updates)

    @property
    def train(self) -> dict[str, Any]:
        batch = 2 * len(self.updates[0])
        settings = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "batch_size": batch, "micro_batch_size": 2}
        rates = {"learning_rate": self.rates[0], "critic_learning_rate": self.rates[1] if self.critic else None}
        return {**settings, **rates, "max_grad_norm": self.max_norm}


CASES = ["reward_model", "kto", "ppo", "rto"]
_PPO = {"kl_coef": 0.3, "kl_target": 4.0, "kl_horizon": 16, "gamma": 0.95, "gae_lambda": 0.9, "reward_clip": 1.0}
_RTO = {"version": "v3", "beta1": 0.5, "beta2": 0.2, "beta3": 0.7, "token_reward_clip": 0.4}


def folders_of(folder: ModelFolder) -> dict[str, str]:
    """A random model for each role, and one with a scalar head to train."""
    language = {name: folder(seed=seed) for seed, name in enumerate(["policy", "reference", "teacher"])}
    return language | {
        name: folder(seed=seed, scalar=True) for seed, name in enumerate(["reward", "critic", "scalar"], start=3)
    }


def case_of(name: str, folders: Folders) -> Case:
    if name == "reward_model":
        return Case(objective(name), ONE_STEP, 3, folders["scalar"], [])
    if name == "kto":
        goal = objective(name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
        return Case(goal, ONE_STEP, 3, folders["policy"], [folders["reference"]])
    frozen = [folders["reference"], *([folders["teacher"]] if name == "rto" else []), folders["reward"]]
    goal = objective(name, **(_RTO if name == "rto" else _PPO))
    return Case(goal, TWO_PASSES, 1 if name == "rto" else 2, folders["policy"], frozen, folders["critic"])


def engine_of(case: Case, processes: Processes, stage: int, **more: Any) -> Engine:
    """Nothing stays whole under ZeRO-3."""
    whole = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    return make_engine(
        case.goal, case.policy, case.frozen, processes,
        train=case.train, engine={"zero_stage": stage, **whole}, steps=case.steps, critic=case.critic,
        temperature=case.temperature, **more,
    )  # fmt: skip


def mismatched_rows(some: Examples) -> list[list[Row]]:
    """Each prompt with the next one's response."""
    rows = [rows[0] for rows in some]
    following = [*rows[1:], rows[0]]
    return [[Row(a.prompt_ids, b.response_ids, a.label)] for a, b in zip(rows, following, strict=True)]


def step_batch_of(case: Case, some: Examples, processes: Processes) -> StepBatch:
    """This process's part: of each optimizer step the micro-batches at its places."""
    each = len(case.updates[0]) // processes.world
    mine = [step[processes.rank * each : (processes.rank + 1) * each] for step in case.updates]
    owned = sorted({number for step in mine for number in step})

    def cut(rows: Examples) -> list[Batch]:
        return [batch_of(rows[2 * number : 2 * number + 2], case.goal.data) for number in owned]

    return step_batch(
        cut(some),
        2 * len(case.updates[0]),
        steps=[[owned.index(number) for number in step] for step in mine],
        passes=case.passes,
        mismatched=cut(mismatched_rows(some)) if case.goal.prepares is Prepares.MISMATCHED else (),
    )


def train_engine(engine: Engine, case: Case, start: LoopState | None = None) -> list[dict[str, float]]:
    """The training lines."""
    recorded = Recorded()
    step_batches = [step_batch_of(case, some, engine.processes) for some in case.data]
    run(
        recorded,
        engine,  # type: ignore[arg-type]
        start,
        total_steps=case.steps,
        data=lambda step: step_batches[step // len(case.updates)],
        evaluate=lambda step: {},
    )
    return [metrics for _, metrics in recorded.split("train")]


@contextmanager
def whole_weights(engine: Engine) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Parameters of policy and critic by name."""
    models = {name: deepspeed.module.model for name, deepspeed in engine.deepspeed.items()}
    with gathered([p for model in models.values() for p in model.parameters()]):
        yield {name: dict(model.named_parameters()) for name, model in models.items()}


def plain_models(case: Case) -> dict[str, Any]:
    roles = [role for role in case.goal.needs if role not in (Role.POLICY, Role.CRITIC)]
    paths = {Role.POLICY: case.policy, **dict(zip(roles, case.frozen, strict=True))}
    paths |= {Role.CRITIC: case.critic} if case.critic else {}
    models = {}
    for role, path in paths.items():
        trained = role in (Role.POLICY, Role.CRITIC)
        load = load_scalar_model if case.goal.needs[role].is_scalar else load_model
        models[role] = load(path, section(path), trained=trained).requires_grad_(trained)
    return models


def outputs(models: dict[str, Any], goal: Objective, batch: Batch) -> dict[str, Tensor]:
    """Logits (B, T, V) of every language model, and (B, T) of every scalar head."""
    found = {}
    for role, model in models.items():
        states = model.model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).last_hidden_state
        found[role] = model.score(states).squeeze(-1) if goal.needs[role].is_scalar else model.lm_head(states)
    return found


def train_plainly(case: Case) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """Loss, norms and metrics of each step, and the weights of policy and critic at the end."""
    goal, models = case.goal, plain_models(case)
    trained = {"policy": Role.POLICY, "critic": Role.CRITIC} if case.critic else {"policy": Role.POLICY}
    optimizers = {
        name: torch.optim.AdamW(models[role].parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        for (name, role), rate in zip(trained.items(), case.rates[: len(trained)], strict=True)
    }
    lines, state = [], goal.initial_state()
    for some in case.data:
        batch = batch_of(some, goal.data)
        found: dict[str, Tensor] = {}
        if goal.prepares is not Prepares.NOTHING:
            looked_at = batch if goal.prepares is Prepares.ROLLOUT else batch_of(mismatched_rows(some), goal.data)
            with torch.no_grad():
                said = outputs(models, goal, looked_at)
                prepared = plain_preparation(goal, looked_at, said, state, case.temperature)
            means = step_means([prepared])
            found = {**means, **prepared.terms}
            state = goal.next_state(state, {name: float(mean) for name, mean in means.items()}, len(some))
        for k, step in enumerate(case.updates):
            rows = [row for number in step for row in rows_of(batch, 2 * number)]
            part = Batch(
                batch.kind,
                *(t[rows] for t in (batch.ids_BT, batch.attention_BT, batch.response_BT)),
                batch.label_B[rows],
            )
            ours = {name: value[rows] if value.ndim else value for name, value in found.items()}
            loss = plain_loss(goal, part, outputs(models, goal, part), ours, case.temperature)
            losses = {"policy": loss.per_example.mean()}
            found_here = {name: float(value) for name, value in found.items() if not value.ndim and k == 0}
            line = (
                {"loss": float(loss.per_example.detach().mean())}
                | {name: float(t / n) for name, (t, n) in loss.metrics.items() if n}
                | found_here
            )
            if loss.critic_per_example is not None:
                losses["critic"] = loss.critic_per_example.mean()
            for name, value in losses.items():
                optimizers[name].zero_grad()
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(models[trained[name]].parameters(), case.max_norm)
                line["grad_norm" if name == "policy" else "critic/grad_norm"] = float(norm)
                optimizers[name].step()
            lines.append(line)
    return lines, {name: dict(models[role].named_parameters()) for name, role in trained.items()}


def rows_of(batch: Batch, example: int) -> range:
    """Of two examples."""
    size = batch.rows // batch.examples
    return range(example * size, (example + 2) * size)
