"""Train one stage, from its checkpoint where it has one, and leave its folder complete."""

from __future__ import annotations

import math
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from aligndistil.data import Sampler
from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.models import export_model
from aligndistil.objectives.base import Prepares, Role
from aligndistil.progress import RunView, Training
from aligndistil.recipe import Stage
from aligndistil.rollout import SamplingParams, TransformersRollout
from aligndistil.run_folder import MetricsLog, StageFolder, adopt_loggers, model_card
from aligndistil.run_folder.environment import PACKAGES, installed_version
from aligndistil.training.batches import DataFeed, RolloutFeed, Share
from aligndistil.training.data import StageData, load_stage_data, scorer_of
from aligndistil.training.evaluation import StageEvaluation
from aligndistil.training.loop import Job, LoopState, Round, train
from aligndistil.training.models import build_engine

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended."""

    steps: int
    seconds: float
    metrics: dict[str, float]
    """The last training and (as eval/...) evaluation metrics."""


class StageLaunch:
    """Everything one stage needs, brought together once; `run` trains it."""

    def __init__(self, stage: Stage, folder: StageFolder, locate: Callable[[str], str], processes: Processes) -> None:
        self.stage, self.folder, self.locate, self.processes = stage, folder, locate, processes
        self.data: StageData = load_stage_data(stage, locate, rank=processes.rank)
        train = stage.train
        self.share = Share(processes.rank, processes.world, train.micro_batch_size)
        rollout = stage.rollout
        responses = (rollout.responses if rollout else None) or train.batch_size
        per_prompt = rollout.samples_per_prompt if rollout else 1
        self.sampler = Sampler(len(self.data.train), responses // per_prompt, train.seed)
        self.minibatches = responses // train.batch_size
        self.updates = self.minibatches * (rollout.epochs if rollout else 1)
        """Optimizer steps on one batch of the sampler."""
        self.total_steps = train.max_steps or self.sampler.steps_for(train.epochs) * self.updates
        self.scorer = scorer_of(stage.data)
        self._data_feed = self._of_data() if rollout is None else None

    def run(self, stop_requested: Callable[[], bool], view: RunView | None = None) -> Outcome:
        """Train to the end and export, shown in `view`; continues from the newest checkpoint in the folder."""
        stage, processes = self.stage, self.processes
        forget_peak_memory()
        adopt_loggers()
        engine = build_engine(stage, self.data, self.locate, processes, self.total_steps)
        adopt_loggers()  # again: loading made new ones
        with ExitStack() as stack:
            stack.callback(engine.close)
            state, seconds_before = self._resume(engine)
            began = time.monotonic()
            log = stack.enter_context(self._open_log(state.step))
            if view is None:
                headlines = {stage.name: stage.objective.headline}
                view = stack.enter_context(RunView(stage.name, {stage.name: ()}, headlines, rank=processes.rank))
            progress = stack.enter_context(view.training(stage.name, self.total_steps, state.step, log.read()))
            job = self._job(engine, log, progress, stop_requested, lambda: seconds_before + time.monotonic() - began)
            last = train(job, state)
            self._export(engine, last)
            return Outcome(self.total_steps, seconds_before + time.monotonic() - began, last)

    def _resume(self, engine: Engine) -> tuple[LoopState, float]:
        found = checkpoints(self.folder.path)
        if not found:
            return LoopState(), 0.0
        saved = load_checkpoint(engine, found[-1])
        seconds = saved.pop("seconds")
        return LoopState(**saved), seconds

    def _open_log(self, step: int) -> MetricsLog:
        if self.processes.is_main:
            log = self.folder.open_metrics(self.stage.logging.trackers, step)
            if step == 0:
                log.truncate(-1)  # a run that starts over evaluates at step 0 again
            return log
        return MetricsLog(self.folder.path / "unused")

    def _job(
        self,
        engine: Engine,
        log: MetricsLog,
        progress: Training,
        stop_requested: Callable[[], bool],
        seconds: Callable[[], float],
    ) -> Job:
        stage = self.stage

        def checkpoint(state: LoopState) -> None:
            saved = asdict(state) | {"seconds": seconds()}
            save_checkpoint(engine, self.folder.path, saved, keep=stage.checkpoint.keep)

        reference = stage.models.get(Role.REFERENCE)
        starts_at_reference = reference is not None and self.locate(reference) == self.locate(stage.model.path)
        return Job(
            stage=stage.name,
            engine=engine,
            peers=self.processes,
            total_steps=self.total_steps,
            data=self._feed(engine),
            epoch=lambda step: self.sampler.epoch(step) / self.updates,
            evaluate=self._evaluation(engine),
            checkpoint=checkpoint,
            log=log.log if self.processes.is_main else lambda step, split, metrics: None,
            progress=progress.update,
            stop_requested=stop_requested,
            peak_memory_gib=peak_memory_gib,
            log_every=stage.logging.every,
            evaluate_every=stage.evaluation.every,
            checkpoint_every=stage.checkpoint.every,
            expected=stage.objective.first_step() if starts_at_reference else (),
        )

    def _of_data(self) -> DataFeed:
        data, prepares = self.data, self.stage.objective.prepares
        feed = DataFeed(
            data.train, self.sampler, self.share, data.tokenizer.pad_token_id, prepares is Prepares.MISMATCHED
        )
        feed.check(self.total_steps)
        return feed

    def _feed(self, engine: Engine) -> Callable[[int], Round]:
        stage, data, rollout = self.stage, self.data, self.stage.rollout
        if self._data_feed is not None:
            return self._data_feed
        assert rollout is not None
        return RolloutFeed(
            data.train,
            self.sampler,
            self.share,
            data.tokenizer,
            self._rollout(engine, rollout.batch_size or stage.train.micro_batch_size),
            SamplingParams(rollout.max_new_tokens, rollout.temperature, rollout.top_p),
            rollout.samples_per_prompt,
            stage.train.seed,
            self.scorer,
            self._write_rollout,
            self.minibatches,
            rollout.epochs,
        )

    def _rollout(self, engine: Engine, batch_size: int) -> TransformersRollout:
        synced = engine.zero_stage == 3 and self.processes.world > 1
        return TransformersRollout(
            engine.generating,
            self.data.stop_ids,
            self.data.tokenizer.pad_token_id,
            engine.vocab,
            batch_size,
            synced=synced,
        )

    def _write_rollout(self, step: int, rows: list[dict[str, Any]]) -> None:
        logging = self.stage.logging
        logged = any(one % logging.every == 0 for one in range(step, step + self.updates))
        if self.processes.is_main and logging.samples and logged:
            self.folder.samples(step, rows[: logging.samples])

    def _evaluation(self, engine: Engine) -> StageEvaluation:
        size = self.stage.evaluation.batch_size or self.stage.train.micro_batch_size
        rollout = self._rollout(engine, size)
        return StageEvaluation.of(self.stage, self.data, engine, rollout, self.processes, self.folder, self.scorer)

    def _export(self, engine: Engine, metrics: dict[str, float]) -> None:
        stage = self.stage
        state = engine.state_dict()
        _note_scores(engine.model.config, metrics)
        if self.processes.is_main:
            card = model_card(
                name=stage.name,
                base_model=stage.model.path,
                objective=stage.objective.name,
                scalar=stage.objective.is_scalar,
                paper=stage.objective.paper,
                models={str(role): path for role, path in stage.models.items()},
                data=[source.path for source in stage.data.train],
                metrics=metrics,
                recipe=stage.resolved(),
                versions={package: installed_version(package) for package in PACKAGES},
            )
            export_model(engine.model, state, self.data.tokenizer, self.data.stop_ids, self.folder.final, card)
        self.processes.barrier()


def _note_scores(config: PretrainedConfig, metrics: dict[str, float]) -> None:
    """What a stage needs that normalizes the scores of this model, and not of the one that it started from."""
    for name in ("score_mean", "score_std"):
        if hasattr(config, name):
            delattr(config, name)
    mean, square = metrics.get("eval/scores/mean"), metrics.get("eval/scores/square")
    if mean is not None and square is not None:
        config.score_mean, config.score_std = mean, math.sqrt(max(square - mean**2, 0.0)) or 1.0


def forget_peak_memory() -> None:
    """Start measuring anew, so that a stage does not report an earlier one's peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # "reset the peak resident set size", man 5 proc


def peak_memory_gib() -> float:
    """The most this process has held since then: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if found is not None:
            return int(found.group(1)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class StopSignal:
    """Turns SIGTERM into a request that the loop honours after the step it is in."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
