"""The loop of training with fakes: an engine of one number, and a record of everything that is logged and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.errors import EXIT_SIGTERM
from aligndistil.maths import Metric, mean_of
from aligndistil.objectives.base import Expected, Loss, Objective, Prepared, Prepares, State
from aligndistil.training.batches import StepBatch
from aligndistil.training.checkpoints import LoopState
from aligndistil.training.loop import train

PERF = {"perf/step_seconds", "perf/tokens_per_second", "perf/peak_memory_gib", "perf/real_token_fraction"}


class PreparesNothing(Objective):
    data = DataKind.RESPONSES
    name: str = "plain"


class PreparesRollout(PreparesNothing):
    """Prepares the first token of every row, and carries the sum of what it found, weighted by examples."""

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


class PreparesMismatched(PreparesRollout):
    """The same of mismatched rows."""

    prepares = Prepares.MISMATCHED


class Alone:
    """This process, which is the only one."""

    rank, world, is_main = 0, 1, True

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values


@dataclass
class ToyEngine:
    """The loss of a row is its first token divided by ten; `norms` are what its steps report."""

    norms: Sequence[float] = (1.0,)
    losses: dict[int, float] = field(default_factory=dict)
    """Of steps whose loss is another one."""
    critic: dict[str, float] = field(default_factory=dict)
    objective: Objective = field(default_factory=PreparesNothing)
    processes: Any = field(default_factory=Alone)
    steps: int = 0
    micro_steps: list[tuple[int, int, bool]] = field(default_factory=list)
    """Rows, examples of the optimizer step, and whether it was the last one before it."""
    prepared: list[dict[str, Tensor]] = field(default_factory=list)
    """What each micro-step was given."""

    def settle(self, batch: Batch) -> None:
        pass

    def prepare(self, batch: Batch, micro_batches: Sequence[Sequence[int]], state: State) -> Prepared:
        return self.objective.prepare(batch, {}, state)

    def loss(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss:
        self.prepared.append(dict(prepared))
        return self.evaluate(batch, prepared)

    def backward(self, loss: Loss, *, examples: int, last: bool) -> None:
        self.micro_steps.append((len(loss.per_example), examples, last))

    def evaluate(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss:
        values = batch.ids_BT[:, 0] / 10
        values = torch.full_like(values, self.losses[self.steps]) if self.steps in self.losses else values
        metrics = {"lengths": Metric(batch.length_B.sum(), torch.tensor(float(batch.rows)))}
        if "seen/first" in prepared:
            metrics["loss/given"] = mean_of(prepared["seen/first"].expand(batch.rows))
        return Loss(values, metrics, {"top": values.max()})

    def step(self) -> dict[str, float]:
        self.steps += 1
        norm = self.norms[min(self.steps, len(self.norms)) - 1]
        return {"grad_norm": norm, "learning_rate": 0.1 * self.steps, **self.critic}


def batch(*firsts: int) -> Batch:
    """A row for each number, of two prompt tokens and as many response tokens as its place."""
    rows = [Row([first, 3], [4] * (place + 1)) for place, first in enumerate(firsts)]
    return collate(rows, DataKind.RESPONSES, 0)


@dataclass
class Recorded:
    """What a run of the loop logged, saved and evaluated."""

    lines: list[tuple[int, str, dict[str, float]]] = field(default_factory=list)
    saved: list[LoopState] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)

    def split(self, name: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, metrics) for step, split, metrics in self.lines if split == name]

    def steps_with(self, metric: str) -> list[int]:
        return [step for step, metrics in self.split("train") if metric in metrics]


@dataclass
class Batches:
    """Step batches that a function of the step makes."""

    at: Callable[[int], StepBatch]
    total_steps: int
    epoch: Callable[[int], float]


@dataclass
class Evaluation:
    run: Callable[[int], dict[str, float]]
    every: int | None


@dataclass
class Checkpoints:
    start: LoopState | None
    recorded: Recorded
    every: int | None
    overdue_at: int | None = None
    asked: int = 0

    def restore(self) -> LoopState | None:
        return self.start

    def overdue(self) -> bool:
        self.asked += 1
        return self.asked == self.overdue_at

    def due(self, before: int, after: int) -> bool:
        return self.every is not None and before // self.every != after // self.every

    def save(self, state: LoopState) -> None:
        self.recorded.saved.append(deepcopy(state))


@dataclass
class Log:
    recorded: Recorded
    every: int

    def open(self, step: int) -> None:
        pass

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        self.recorded.lines.append((step, split, metrics))


class Stop:
    """Asked once a step."""

    exit_code = EXIT_SIGTERM

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    @property
    def requested(self) -> bool:
        return self._asked()

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()


def step_batch(
    micro_batches: Sequence[Batch],
    examples: int,
    metrics: Mapping[str, Metric] | None = None,
    steps: Sequence[Sequence[int]] | None = None,
    **more: Any,
) -> StepBatch:
    """One optimizer step on all micro-batches, unless `steps` says which each of several takes."""
    starts = list(accumulate((one.rows for one in micro_batches), initial=0))
    rows = [range(start, end) for start, end in pairwise(starts)]
    width = max(one.width for one in micro_batches)
    parts = [
        torch.cat([F.pad(getattr(one, name), (0, width - one.width)) for one in micro_batches])
        for name in ("ids_BT", "attention_BT", "response_BT")
    ]
    whole = Batch(micro_batches[0].kind, *parts, torch.cat([one.label_B for one in micro_batches]))
    order = [range(len(micro_batches))] if steps is None else steps
    return StepBatch(whole, examples, [[rows[i] for i in step] for step in order], metrics or {}, **more)


def run(
    recorded: Recorded,
    engine: ToyEngine | None = None,
    start: LoopState | None = None,
    *,
    total_steps: int = 4,
    data: Callable[[int], StepBatch] = lambda step: step_batch([batch(step + 1, 5), batch(8)], 3),
    evaluate: Callable[[int], dict[str, float]] = lambda step: {"loss": 0.5},
    stop_requested: Callable[[], bool] = lambda: False,
    log_every: int = 1,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    overdue_at: int | None = None,
    expected: Sequence[Expected] = (),
) -> LoopState:
    """The loop with fakes, and what it returns; what it logs, saves and evaluates is in `recorded`."""

    def noted(step: int) -> dict[str, float]:
        recorded.evaluated.append(step)
        return evaluate(step)

    parts: dict[str, Any] = {
        "engine": engine or ToyEngine(),
        "batches": Batches(data, total_steps, lambda step: step / 2),
        "evaluation": Evaluation(noted, evaluate_every),
        "log": Log(recorded, log_every),
        "checkpoints": Checkpoints(start, recorded, checkpoint_every, overdue_at),
        "stop": Stop(stop_requested),
    }
    return train("toy", **parts, expected=expected)


def without_perf(lines: list[tuple[int, str, dict[str, float]]]) -> list[Any]:
    return [(step, split, {k: v for k, v in found.items() if k not in PERF}) for step, split, found in lines]
