"""The loop: batches in, optimizer steps, evaluations, checkpoints and metrics out. It knows no objective by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.errors import DivergedError, Interrupted
from aligndistil.maths import Metric
from aligndistil.objectives.base import Expected, Loss, Objective, Prepared, Prepares, State
from aligndistil.training.metrics import Peers, Sums, means_of

CAUSES = (
    "likely causes: the reference is not the model that training starts from, another dtype or chat template, "
    "or dropout that is still active"
)


class StepInfo(Protocol):
    @property
    def learning_rate(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def critic(self) -> Mapping[str, float]: ...


class Trainer(Protocol):
    """What the loop asks of an engine."""

    @property
    def objective(self) -> Objective: ...
    def prepare(self, batch: Batch, state: State) -> Prepared: ...
    def micro_step(self, batch: Batch, prepared: Mapping[str, Tensor], *, examples: int, last: bool) -> Loss: ...
    def step(self) -> StepInfo: ...
    def evaluate(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss: ...


@dataclass(frozen=True, slots=True)
class Round:
    """A global batch, or a rollout that several optimizer steps are taken on, as one process sees it."""

    micro_batches: Sequence[Batch]
    examples: int
    """Examples of one optimizer step over all processes."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """What making the batch measured (a rollout's lengths, say)."""
    mismatched: Sequence[Batch] = ()
    """For an objective that prepares on mismatched rows."""
    updates: Sequence[Sequence[int]] | None = None
    """Micro-batches of each optimizer step; None is one step on all of them."""

    @property
    def parts(self) -> Sequence[Sequence[int]]:
        return self.updates if self.updates is not None else [range(len(self.micro_batches))]

    @property
    def all_examples(self) -> int:
        """Different examples over all processes, however many optimizer steps see each."""
        return self.examples * len(self.micro_batches) // len(self.parts[0])


@dataclass(slots=True)
class LoopState:
    """Where the loop is; saved with a checkpoint."""

    step: int = 0
    num_tokens: int = 0
    objective: dict[str, float] = field(default_factory=dict)
    """What the objective carries from round to round."""
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
    data: Callable[[int], Round]
    """The round that starts at a step."""
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

    Evaluations and checkpoints that fall due inside a round wait for its end, so that a resumed run is exact.
    Raises DivergedError for a loss that is not finite or a first step that contradicts the objective, and Interrupted
    when a stop was requested, after a checkpoint.
    """
    if state.step == 0:
        state.objective = job.engine.objective.initial_state()
        if job.evaluate_every:
            job.log(0, "eval", job.evaluate(0))
    while state.step < job.total_steps:
        before = state.step
        stop = _round(job, state)
        done = state.step == job.total_steps
        if done or _due(job.evaluate_every, before, state.step):
            evaluated = job.evaluate(state.step)
            if evaluated:
                job.log(state.step, "eval", evaluated)
            state.last |= {f"eval/{name}": value for name, value in evaluated.items()}
        if stop or (_due(job.checkpoint_every, before, state.step) and not done):
            job.checkpoint(state)
        if stop and not done:
            raise Interrupted(
                f"stage {job.stage}: stopped after step {state.step}; a checkpoint is saved, run the same command to "
                "go on"
            )
    return state.last


def _due(every: int | None, before: int, after: int) -> bool:
    return every is not None and before // every != after // every


def _round(job: Job, state: LoopState) -> bool:
    """All optimizer steps of one round; returns whether any process was asked to stop."""
    began, stop = time.perf_counter(), False
    data = job.data(state.step)
    prepared = _prepare(job.engine, job.peers, data, state.objective)
    for number, part in enumerate(data.parts[: job.total_steps - state.step]):
        sums = Sums()
        if number == 0:
            for name, metric in data.metrics.items():
                sums.add_metric(name, metric)
        stop |= _gradient(job, data, part, prepared, sums)
        if number == 0:
            sums.adopt(prepared.sums)
        _refuse_divergence(job, state, sums.means())
        _step(job, state, sums, began)
        began = time.perf_counter()
    if job.engine.objective.prepares is not Prepares.NOTHING:
        state.objective = job.engine.objective.next_state(state.objective, prepared.means, data.all_examples)
    return stop


def _step(job: Job, state: LoopState, sums: Sums, began: float) -> None:
    """The optimizer step of gradients that are there, and what is said of it."""
    info = job.engine.step()
    for norm in (info.grad_norm, *(value for name, value in info.critic.items() if name.endswith("grad_norm"))):
        if not math.isfinite(norm):
            raise DivergedError(_diverged(job, state.step + 1, f"the gradient norm is {norm}"))
    state.step += 1
    state.num_tokens += int(sums.totals["num_tokens"][0])
    seconds = time.perf_counter() - began
    own = {"grad_norm": info.grad_norm, "learning_rate": info.learning_rate, "perf/step_seconds": seconds}
    for name, value in (own | dict(info.critic)).items():
        sums.put(name, value)
    sums.put("perf/tokens_per_second", sums.totals["num_tokens"][0] / seconds)
    sums.add_to(state.pending, state.pending_maxima)
    job.progress(state.step, sums.means())
    if state.step % job.log_every == 0 or state.step == job.total_steps:
        state.last = means_of(state.pending) | state.pending_maxima
        state.last |= {"epoch": job.epoch(state.step), "num_tokens": state.num_tokens}
        job.log(state.step, "train", state.last)
        state.pending, state.pending_maxima = {}, {}


@dataclass(frozen=True, slots=True)
class _PreparedRound:
    terms: Sequence[Mapping[str, Tensor]]
    """Of each micro-batch."""
    sums: Sums

    @property
    def means(self) -> dict[str, float]:
        return self.sums.means()

    def of(self, micro_batch: int) -> dict[str, Tensor]:
        """What the loss of a micro-batch is given."""
        # float64, since variances are differences of them
        means = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.means.items()}
        return {**means, **self.terms[micro_batch]} if self.terms else means


def _prepare(engine: Trainer, peers: Peers, data: Round, state: State) -> _PreparedRound:
    """Let the objective look at the whole round before the first gradient, without gradient."""
    prepares = engine.objective.prepares
    if prepares is Prepares.NOTHING:
        return _PreparedRound((), Sums())
    batches = data.micro_batches if prepares is Prepares.ROLLOUT else data.mismatched
    found = [engine.prepare(batch, state) for batch in batches]
    sums = _over_the_round(peers, [(one, 1.0) for one in found])
    return _PreparedRound([one.terms for one in found] if prepares is Prepares.ROLLOUT else (), sums)


def _over_the_round(peers: Peers, found: Sequence[tuple[Prepared, float]]) -> Sums:
    sums = Sums()
    for one, weight in found:
        for name, (total, count) in one.metrics.items():
            sums.add_metric(name, Metric(total * weight, count * weight))
    sums.reduce(peers)
    return sums


def evaluation_pass(
    engine: Trainer,
    peers: Peers,
    batches: Sequence[tuple[Batch, bool]],
    mismatched: Sequence[tuple[Batch, bool]] = (),
) -> dict[str, float]:
    """Mean loss and metrics over all processes' batches; a batch marked False is evaluated and not counted."""
    found = [(engine.prepare(batch, {}), float(counts)) for batch, counts in mismatched]
    prepared = _PreparedRound((), _over_the_round(peers, found))
    sums = Sums()
    for batch, counts in batches:
        sums.add(engine.evaluate(batch, prepared.of(0)), weight=float(counts))
    sums.reduce(peers)
    return prepared.means | sums.means() | sums.maxima


def _gradient(job: Job, data: Round, part: Sequence[int], prepared: _PreparedRound, sums: Sums) -> bool:
    """The micro-batches of an optimizer step; returns whether any process was asked to stop."""
    for number in part:
        batch = data.micro_batches[number]
        last = number == part[-1]
        loss = job.engine.micro_step(batch, prepared.of(number), examples=data.examples, last=last)
        sums.add(loss)
        sums.add_metric("num_tokens", Metric(batch.attention_BT.sum(), torch.ones(())))
    sums.add_maximum("stop", torch.tensor(float(job.stop_requested())))
    sums.add_maximum("perf/peak_memory_gib", torch.tensor(job.peak_memory_gib()))
    sums.reduce(job.peers)
    return bool(sums.maxima.pop("stop"))


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
