"""The loop that trains one stage. It knows no objective by name; `train` reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch

from aligndistil.engine.engine import Engine
from aligndistil.engine.memory import peak_memory_gib
from aligndistil.errors import DivergedError, Interrupted
from aligndistil.maths import count_of
from aligndistil.objectives.base import Expected, Prepares
from aligndistil.stop import StopSignal
from aligndistil.training.agreement import compare_sampling, what_to_do
from aligndistil.training.batches import DataBatches, RolloutBatches
from aligndistil.training.checkpoints import Checkpoints, LoopState
from aligndistil.training.evaluation import StageEvaluation
from aligndistil.training.log import StageLog
from aligndistil.training.memory import MemoryCheck
from aligndistil.training.metrics import Sums, means_of
from aligndistil.training.preparation import prepare

CAUSES = (
    "likely causes: the reference is not the model that training starts from, another dtype or chat template, "
    "or noise that is still active"
)


def train(
    stage: str,
    *,
    engine: Engine,
    batches: DataBatches | RolloutBatches,
    evaluation: StageEvaluation,
    log: StageLog,
    checkpoints: Checkpoints,
    stop: StopSignal,
    expected: Sequence[Expected] = (),
    memory: MemoryCheck | None = None,
) -> LoopState:
    """Train a stage from its newest checkpoint, or from the start, to its end.

    One turn of the outer loop is a step batch: a global batch of the data and one optimizer step, or a rollout and
    several. Evaluations, checkpoints and stops that fall due inside a rollout wait for its end, so that a resumed run
    samples its next rollout from the same policy. `expected` must hold at the first step.

    Raises DivergedError for a loss or gradient that is not finite, for a first step that contradicts the objective, and
    for a first rollout whose samples are not the policy's; Interrupted, after a checkpoint, when a stop was requested
    of any process.
    """
    state = checkpoints.restore() or LoopState(objective=engine.objective.initial_state())
    began_at, began_step = time.monotonic() - state.seconds, state.step
    log.open(state.step)
    if state.step == 0 and evaluation.every:
        log.write(0, "eval", evaluation.run(0))

    while state.step < batches.total_steps:
        first, began, stopping, saving = state.step, time.perf_counter(), False, False

        # What is learnt from: examples of the data, or answers that the policy gives now. And what the objective must
        # know of all of it before the first gradient: KTO's mean KL; PPO's rewards, advantages and their spread, with
        # the KL to the reference that the reward is charged for.
        batch = batches.at(state.step)
        if first == began_step:
            engine.settle(batch.batch.take(batch.micro_batches[0]))
        agreement = compare_sampling(engine, batch) if batch.sampled_logp_BT is not None else None
        if agreement is not None and agreement.problem:
            raise DivergedError(f"stage {stage}: {agreement.problem}; {what_to_do('rollout.batch_size')}")
        prepared = prepare(engine, batch, state.objective)

        for number, micro_batches in enumerate(batch.steps[: batches.total_steps - first]):
            # The gradient. Every example counts 1 / batch.examples, the number of examples of the optimizer step on
            # all processes: how a batch is cut into micro-batches and processes changes nothing.
            sums = Sums(batch.metrics if number == 0 else {})
            for i, rows in enumerate(micro_batches, start=1):
                micro_batch = batch.batch.take(rows)
                loss = engine.loss(micro_batch, prepared.terms(rows, micro_batch.width))
                engine.backward(loss, examples=batch.examples, last=i == len(micro_batches))
                sums.add(loss)
                sums.add_metric("num_tokens", count_of(micro_batch.tokens, 1))
                sums.add_metric("perf/real_token_fraction", count_of(micro_batch.tokens, micro_batch.ids_BT.numel()))
            sums.add_maximum("stop", torch.tensor(float(stop.requested)))
            sums.add_maximum("overdue", torch.tensor(float(checkpoints.overdue())))
            sums.add_maximum("perf/peak_memory_gib", torch.tensor(peak_memory_gib()))
            sums.reduce(engine.processes)
            stopping |= bool(sums.maxima.pop("stop"))
            saving |= bool(sums.maxima.pop("overdue"))
            if number == 0:
                sums.adopt(prepared.sums)
            if agreement is not None and state.step == 0:  # a resumed run compares again, and logs what it would have
                sums.adopt(agreement.sums)
            _refuse_divergence(stage, state.step, sums.means(), expected)

            # The step: the gradient is clipped, AdamW moves the weights, the schedule moves the learning rate.
            own = engine.step()
            _refuse_infinite_gradient(stage, state.step, own)
            seconds = time.perf_counter() - began
            state.step += 1
            state.num_tokens += int(sums.totals["num_tokens"][0])
            own |= {"perf/step_seconds": seconds, "perf/tokens_per_second": sums.totals["num_tokens"][0] / seconds}
            own |= memory.after_step(state.step, batch.batch.width) if memory else {}
            for name, value in own.items():
                sums.put(name, value)

            # A line every `log.every` steps: means and maxima over them.
            sums.add_to(state.pending, state.pending_maxima)
            log.progress(state.step, sums.means())
            if state.step % log.every == 0 or state.step == batches.total_steps:
                state.last = means_of(state.pending) | state.pending_maxima
                state.last |= {"epoch": batches.epoch(state.step), "num_tokens": state.num_tokens}
                log.write(state.step, "train", state.last)
                state.pending, state.pending_maxima = {}, {}
            began = time.perf_counter()

        if engine.objective.prepares is not Prepares.NOTHING:
            state.objective = engine.objective.next_state(state.objective, prepared.sums.means(), batch.all_examples)

        # Now and then. A process that is killed before its checkpoint repeats what came after the last one, to the bit.
        done = state.step == batches.total_steps
        if done or _due(evaluation.every, first, state.step):
            evaluated = evaluation.run(state.step)
            if evaluated:
                log.write(state.step, "eval", evaluated)
            state.last |= {f"eval/{name}": value for name, value in evaluated.items()}
        state.seconds = time.monotonic() - began_at
        if stopping or ((saving or checkpoints.due(first, state.step)) and not done):
            checkpoints.save(state)
        if stopping and not done:
            raise Interrupted(
                f"stage {stage}: stopped after step {state.step}; a checkpoint is saved, run the same command to go on",
                stop.exit_code,
            )
    return state


def _due(every: int | None, before: int, after: int) -> bool:
    return every is not None and before // every != after // every


def _refuse_divergence(stage: str, step: int, means: Mapping[str, float], expected: Sequence[Expected]) -> None:
    if not math.isfinite(means["loss"]):
        raise DivergedError(_diverged(stage, step + 1, f"the loss is {means['loss']}"))
    for metric, value, tolerance, why in expected if step == 0 else ():
        if abs(means[metric] - value) > max(tolerance, 1e-6):  # float32 itself has no more digits
            raise DivergedError(
                f"stage {stage}: the first step has {metric} = {means[metric]:.4f} and should have {value:.4f}, "
                f"since {why}; {CAUSES}"
            )


def _refuse_infinite_gradient(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if name.endswith("grad_norm") and not math.isfinite(value):
            raise DivergedError(_diverged(stage, step + 1, f"the gradient norm is {value}"))


def _diverged(stage: str, step: int, what: str) -> str:
    return (
        f"stage {stage}: {what} at step {step}; nothing was exported and the last checkpoint is untouched; "
        "lower train.learning_rate, raise train.warmup_ratio, or look at the data of this step"
    )
