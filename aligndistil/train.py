"""The loop: batches in, optimizer steps, evaluations, checkpoints and metrics out. It knows no objective by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.errors import DivergedError, Interrupted
from aligndistil.maths import Metric, mean_of
from aligndistil.objectives.base import Expected, Loss

CAUSES = (
    "likely causes: the reference is not the model that training starts from, another dtype or chat template, "
    "or dropout that is still active"
)


class StepInfo(Protocol):
    @property
    def learning_rate(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...


class Trainer(Protocol):
    """What the loop asks of an engine."""

    def micro_step(self, batch: Batch, *, examples: int, last: bool) -> Loss: ...
    def step(self) -> StepInfo: ...
    def evaluate(self, batch: Batch) -> Loss: ...


class Peers(Protocol):
    """What the loop asks of the process group; every method is collective and works in place."""

    def sum(self, values: Tensor) -> Tensor: ...
    def max(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StepData:
    """One global step, as one process sees it."""

    micro_batches: Sequence[Batch]
    examples: int
    """Examples of the step over all processes."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """What making the batch measured (a rollout's lengths, say)."""


@dataclass(slots=True)
class LoopState:
    """Where the loop is; saved with a checkpoint."""

    step: int = 0
    num_tokens: int = 0
    pending: dict[str, list[float]] = field(default_factory=dict)
    """Totals and counts since the last logged step."""
    pending_maxima: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """The newest training and (as eval/...) evaluation metrics."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything `train` needs, and whom it tells."""

    stage: str
    engine: Trainer
    peers: Peers
    total_steps: int
    data: Callable[[int], StepData]
    epoch: Callable[[int], float]
    """Epochs of the training data that n steps have read."""
    evaluate: Callable[[int], dict[str, float]]
    checkpoint: Callable[[LoopState], None]
    log: Callable[[int, str, dict[str, float]], None]
    progress: Callable[[int, dict[str, float]], None]
    stop_requested: Callable[[], bool]
    peak_memory_gib: Callable[[], float]
    log_every: int = 1
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    expected: Sequence[Expected] = ()
    """What must hold at the first step, when training starts from the reference."""


def train(job: Job, state: LoopState) -> dict[str, float]:
    """Run `job` from `state` to its end; returns the last training and evaluation metrics.

    Raises DivergedError for a loss that is not finite or a first step that contradicts the objective, and Interrupted
    when a stop was requested, after a checkpoint.
    """
    if state.step == 0 and job.evaluate_every:
        job.log(0, "eval", job.evaluate(0))
    while state.step < job.total_steps:
        began = time.perf_counter()
        step_data = job.data(state.step)
        sums, stop = _gradient(job, step_data)
        means = sums.means()
        _refuse_divergence(job, state, means)
        info = job.engine.step()
        if not math.isfinite(info.grad_norm):
            raise DivergedError(_diverged(job, state.step + 1, f"the gradient norm is {info.grad_norm}"))
        state.step += 1
        state.num_tokens += int(sums.totals["num_tokens"][0])
        seconds = time.perf_counter() - began
        sums.put("grad_norm", info.grad_norm)
        sums.put("learning_rate", info.learning_rate)
        sums.put("perf/step_seconds", seconds)
        sums.put("perf/tokens_per_second", sums.totals["num_tokens"][0] / seconds)
        sums.add_to(state.pending, state.pending_maxima)
        job.progress(state.step, sums.means())
        done = state.step == job.total_steps
        if state.step % job.log_every == 0 or done:
            state.last = _means(state.pending) | state.pending_maxima
            state.last |= {"epoch": job.epoch(state.step), "num_tokens": state.num_tokens}
            job.log(state.step, "train", state.last)
            state.pending, state.pending_maxima = {}, {}
        if done or (job.evaluate_every and state.step % job.evaluate_every == 0):
            evaluated = job.evaluate(state.step)
            if evaluated:
                job.log(state.step, "eval", evaluated)
            state.last |= {f"eval/{name}": value for name, value in evaluated.items()}
        if stop or (job.checkpoint_every and state.step % job.checkpoint_every == 0 and not done):
            job.checkpoint(state)
        if stop and not done:
            raise Interrupted(
                f"stage {job.stage}: stopped after step {state.step}; a checkpoint is saved, run the same command to "
                "go on"
            )
    return state.last


def evaluation_pass(engine: Trainer, peers: Peers, batches: Iterable[tuple[Batch, bool]]) -> dict[str, float]:
    """Mean loss and metrics over all processes' batches; a batch marked False is evaluated and not counted."""
    sums = Sums()
    for batch, counts in batches:
        sums.add(engine.evaluate(batch), weight=float(counts))
    sums.reduce(peers)
    return sums.means() | sums.maxima


def _gradient(job: Job, data: StepData) -> tuple[Sums, bool]:
    """All micro-batches of a step; returns the sums over processes, and whether any process was asked to stop."""
    sums = Sums()
    for number, batch in enumerate(data.micro_batches):
        loss = job.engine.micro_step(batch, examples=data.examples, last=number == len(data.micro_batches) - 1)
        sums.add(loss)
        sums.add_metric("num_tokens", Metric(batch.attention_BT.sum(), torch.ones(())))
    for name, metric in data.metrics.items():
        sums.add_metric(name, metric)
    sums.add_maximum("stop", torch.tensor(float(job.stop_requested())))
    sums.add_maximum("perf/peak_memory_gib", torch.tensor(job.peak_memory_gib()))
    sums.reduce(job.peers)
    return sums, bool(sums.maxima.pop("stop"))


def _refuse_divergence(job: Job, state: LoopState, means: dict[str, float]) -> None:
    if not math.isfinite(means["loss"]):
        raise DivergedError(_diverged(job, state.step + 1, f"the loss is {means['loss']}"))
    if state.step > 0:
        return
    for expected in job.expected:
        value = means[expected.metric]
        if abs(value - expected.value) > expected.tolerance:
            raise DivergedError(
                f"stage {job.stage}: the first step has {expected.metric} = {value:.4f} and should have "
                f"{expected.value:.4f}, since {expected.why}; {CAUSES}"
            )


def _diverged(job: Job, step: int, what: str) -> str:
    return (
        f"stage {job.stage}: {what} at step {step}; nothing was exported and the last checkpoint is untouched; "
        "lower train.learning_rate, raise train.warmup_ratio, or look at the data of this step"
    )


class Sums:
    """Totals and counts of metrics, reduced over processes at once."""

    def __init__(self) -> None:
        self._tensors: dict[str, Metric] = {}
        self._maxima: dict[str, Tensor] = {}
        self.totals: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, loss: Loss, weight: float = 1.0) -> None:
        for name, metric in {"loss": mean_of(loss.per_example), **loss.metrics}.items():
            self.add_metric(name, Metric(metric.total * weight, metric.count * weight))
        for name, value in loss.maxima.items():
            self.add_maximum(name, value * weight)

    def add_metric(self, name: str, metric: Metric) -> None:
        old = self._tensors.get(name)
        total, count = metric.total.detach().double(), metric.count.double()
        self._tensors[name] = Metric(total, count) if old is None else Metric(old.total + total, old.count + count)

    def add_maximum(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._maxima[name] = value if name not in self._maxima else torch.maximum(self._maxima[name], value)

    def put(self, name: str, value: float) -> None:
        """Add a number that is the same on every process, after `reduce`."""
        self.totals[name] = (value, 1.0)

    def reduce(self, peers: Peers) -> None:
        """Sum over processes, with one transfer from the device. All have the same names in the same order."""
        device = self._tensors["loss"].total.device
        flat = torch.stack([part.to(device) for metric in self._tensors.values() for part in metric])
        pairs = peers.sum(flat).view(-1, 2).tolist()
        self.totals = {name: (total, count) for name, (total, count) in zip(self._tensors, pairs, strict=True)}
        if self._maxima:
            peaks = peers.max(torch.stack([value.to(device) for value in self._maxima.values()]))
            self.maxima = dict(zip(self._maxima, peaks.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        return _means(self.totals)

    def add_to(self, pending: dict[str, list[float]], maxima: dict[str, float]) -> None:
        for name, (total, count) in self.totals.items():
            old = pending.setdefault(name, [0.0, 0.0])
            pending[name] = [old[0] + total, old[1] + count]
        for name, value in self.maxima.items():
            maxima[name] = max(value, maxima.get(name, value))


def _means(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items() if count and name != "num_tokens"}
