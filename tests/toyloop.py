"""An engine of one number for the loop, and somebody who is told everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.maths import Metric, mean_of
from aligndistil.objectives.base import Loss, Objective, Prepared, Prepares, State
from aligndistil.training.loop import Job, LoopState, Round

PERF = {"perf/step_seconds", "perf/tokens_per_second", "perf/peak_memory_gib"}


class Plain(Objective):
    """Looks at nothing beforehand."""

    data = DataKind.RESPONSES
    name: str = "plain"


class Looks(Plain):
    """Finds the first token of every row beforehand, and carries the sum of what it found, weighted by examples."""

    prepares = Prepares.ROLLOUT
    given: ClassVar[list[State]] = []

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: State) -> Prepared:
        self.given.append(dict(state))
        first_B = batch.ids_BT[:, 0].float()
        return Prepared({"first": first_B[:, None] * batch.response_BT}, {"seen/first": mean_of(first_B)})

    def initial_state(self) -> dict[str, float]:
        return {"carried": 0.5}

    def next_state(self, state: State, means: Mapping[str, float], examples: int) -> dict[str, float]:
        return {"carried": state["carried"] + examples * means["seen/first"]}


class LooksAside(Looks):
    """The same on mismatched rows."""

    prepares = Prepares.MISMATCHED


@dataclass
class Info:
    learning_rate: float
    grad_norm: float
    critic: dict[str, float] = field(default_factory=dict)


@dataclass
class ToyEngine:
    """The loss of a row is its first token divided by ten; `norms` are what its steps report."""

    norms: Sequence[float] = (1.0,)
    losses: dict[int, float] = field(default_factory=dict)
    """Of steps whose loss is another one."""
    critic: dict[str, float] = field(default_factory=dict)
    objective: Objective = field(default_factory=Plain)
    steps: int = 0
    micro_steps: list[tuple[int, int, bool]] = field(default_factory=list)
    prepared: list[dict[str, Tensor]] = field(default_factory=list)
    """What each micro-step was given."""

    def prepare(self, batch: Batch, state: State) -> Prepared:
        return self.objective.prepare(batch, {}, state)

    def micro_step(self, batch: Batch, prepared: Mapping[str, Tensor], *, examples: int, last: bool) -> Loss:
        self.micro_steps.append((batch.rows, examples, last))
        self.prepared.append(dict(prepared))
        return self.evaluate(batch, prepared)

    def evaluate(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss:
        values = batch.ids_BT[:, 0] / 10
        values = torch.full_like(values, self.losses[self.steps]) if self.steps in self.losses else values
        metrics = {"lengths": Metric(batch.length_B.sum(), torch.tensor(float(batch.rows)))}
        if "seen/first" in prepared:
            metrics["loss/given"] = mean_of(prepared["seen/first"].expand(batch.rows))
        return Loss(values, metrics, {"top": values.max()})

    def step(self) -> Info:
        self.steps += 1
        return Info(0.1 * self.steps, self.norms[min(self.steps, len(self.norms)) - 1], self.critic)


class Alone:
    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values


def batch(*firsts: int) -> Batch:
    """A row for each number, of two prompt tokens and as many response tokens as its place."""
    rows = [Row([first, 3], [4] * (place + 1)) for place, first in enumerate(firsts)]
    return collate(rows, DataKind.RESPONSES, 0)


@dataclass
class Told:
    lines: list[tuple[int, str, dict[str, float]]] = field(default_factory=list)
    saved: list[LoopState] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)

    def split(self, name: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, metrics) for step, split, metrics in self.lines if split == name]

    def steps_with(self, metric: str) -> list[int]:
        return [step for step, metrics in self.split("train") if metric in metrics]


def job_of(told: Told, engine: ToyEngine | None = None, **settings: Any) -> Job:
    def evaluate(step: int) -> dict[str, float]:
        told.evaluated.append(step)
        return {"loss": 0.5}

    defaults: dict[str, Any] = {
        "stage": "toy",
        "engine": engine or ToyEngine(),
        "peers": Alone(),
        "total_steps": 4,
        "data": lambda step: Round([batch(step + 1, 5), batch(8)], 3),
        "epoch": lambda step: step / 2,
        "evaluate": evaluate,
        "checkpoint": lambda state: told.saved.append(deepcopy(state)),
        "log": lambda step, split, metrics: told.lines.append((step, split, metrics)),
        "progress": lambda step, metrics: None,
        "stop_requested": lambda: False,
        "peak_memory_gib": lambda: 1.5,
    }
    return Job(**{**defaults, **settings})


def without_perf(lines: list[tuple[int, str, dict[str, float]]]) -> list[Any]:
    return [(step, split, {k: v for k, v in found.items() if k not in PERF}) for step, split, found in lines]
