"""Train one stage, from its checkpoint where it has one, and leave its folder complete."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from aligndistil.artefacts import MetricsLog, StageFolder, adopt_loggers, model_card
from aligndistil.artefacts.environment import PACKAGES, installed_version
from aligndistil.data import Sampler
from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.launch.feeds import DataFeed, RolloutFeed, Share, eval_batches, sample_rows
from aligndistil.launch.stage_data import StageData, load_stage_data, scorer_of
from aligndistil.models import check_same_tokenizer, export_model, load_model, load_tokenizer, shared_vocab
from aligndistil.objectives.base import Role
from aligndistil.progress import TrainingProgress
from aligndistil.recipe import Stage
from aligndistil.rollout import SamplingParams, TransformersRollout, sample_seed
from aligndistil.train import Job, LoopState, StepData, evaluation_pass, train


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
        per_prompt = stage.rollout.samples_per_prompt if stage.rollout else 1
        self.sampler = Sampler(len(self.data.train), train.batch_size // per_prompt, train.seed)
        self.total_steps = train.max_steps or self.sampler.steps_for(train.epochs)
        self.scorer = scorer_of(stage.data)

    def run(self, stop_requested: Callable[[], bool]) -> Outcome:
        """Train to the end and export; continues from the newest checkpoint in the folder."""
        stage, processes = self.stage, self.processes
        engine = self._engine()
        adopt_loggers()
        with ExitStack() as stack:
            stack.callback(engine.close)
            state, seconds_before = self._resume(engine)
            began = time.monotonic()
            log = stack.enter_context(self._open_log(state.step))
            progress = stack.enter_context(
                TrainingProgress(stage.name, self.total_steps, start=state.step, rank=processes.rank)
            )
            job = self._job(engine, log, progress, stop_requested, lambda: seconds_before + time.monotonic() - began)
            last = train(job, state)
            self._export(engine, last)
            return Outcome(self.total_steps, seconds_before + time.monotonic() - began, last)

    def _engine(self) -> Engine:
        stage, data = self.stage, self.data
        policy = load_model(self.locate(stage.model.path), stage.model, trained=True)
        frozen: dict[Role, PreTrainedModel] = {}
        for role, path in stage.models.items():
            where = self.locate(path)
            check_same_tokenizer(path, data.tokenizer, load_tokenizer(where, stage.model))
            frozen[role] = load_model(where, stage.model, trained=False)
        return Engine(
            policy,
            frozen,
            stage.objective,
            train=stage.train,
            settings=stage.engine,
            processes=self.processes,
            total_steps=self.total_steps,
            vocab=shared_vocab([policy, *frozen.values()], data.tokenizer),
        )

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
        progress: TrainingProgress,
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
            epoch=self.sampler.epoch,
            evaluate=self._evaluation(engine),
            checkpoint=checkpoint,
            log=log.log if self.processes.is_main else lambda step, split, metrics: None,
            progress=progress.update,
            stop_requested=stop_requested,
            peak_memory_gib=_peak_memory_gib,
            log_every=stage.logging.every,
            evaluate_every=stage.evaluation.every,
            checkpoint_every=stage.checkpoint.every,
            expected=stage.objective.first_step() if starts_at_reference else (),
        )

    def _feed(self, engine: Engine) -> Callable[[int], StepData]:
        stage, data = self.stage, self.data
        if stage.rollout is None:
            return DataFeed(data.train, self.sampler, self.share, data.tokenizer.pad_token_id)
        rollout = stage.rollout
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
        if self.processes.is_main and logging.samples and step % logging.every == 0:
            self.folder.samples(step, rows[: logging.samples])

    def _evaluation(self, engine: Engine) -> Callable[[int], dict[str, float]]:
        """The pass over the eval data, and samples for its first prompts."""
        settings, data, stage = self.stage.evaluation, self.data, self.stage
        size = settings.batch_size or stage.train.micro_batch_size
        share = Share(self.share.rank, self.share.world, size)
        pad_id = data.tokenizer.pad_token_id
        batches = eval_batches(data.eval, share, settings.limit, pad_id) if data.eval else []

        def evaluate(step: int) -> dict[str, float]:
            metrics = evaluation_pass(engine, self.processes, batches) if batches else {}
            if settings.samples and data.eval_prompts:
                metrics |= self._sampled(self._rollout(engine, size), step)
            return metrics

        return evaluate

    def _sampled(self, rollout: TransformersRollout, step: int) -> dict[str, float]:
        """Lengths and gold reward of one answer to each of the first eval prompts; the same seeds at every step."""
        settings, data = self.stage.evaluation, self.data
        assert data.eval_prompts is not None
        count, world = min(settings.samples, len(data.eval_prompts)), self.share.world
        # The same number on every process (see eval_batches); the answers beyond `count` are thrown away.
        mine = [i % count for i in range(self.share.rank, -(-count // world) * world, world)]
        prompts = [data.eval_prompts.prompt_ids(i) for i in mine]
        seeds = [sample_seed(self.stage.train.seed, "eval", data.eval_prompts.key(i)) for i in mine]
        params = SamplingParams(settings.max_new_tokens or self.stage.data.max_response_length)
        samples = rollout.generate(prompts, params, seeds)
        gathered = self.processes.gather(list(zip(mine, prompts, samples, strict=True)))
        unique = {i: (prompt, sample) for part in gathered for i, prompt, sample in part}
        asked, answers = [unique[i][0] for i in range(count)], [unique[i][1] for i in range(count)]
        texts = data.tokenizer.batch_decode([list(s.token_ids) for s in answers], skip_special_tokens=True)
        scores = None if self.scorer is None else self.scorer(texts)
        if self.processes.is_main:
            self.folder.eval_samples(step, sample_rows(data.tokenizer, asked, answers, texts, scores))
        metrics = {
            "completions/mean_length": sum(len(s.token_ids) for s in answers) / count,
            "completions/truncated_fraction": sum(not s.finished for s in answers) / count,
        }
        return metrics if scores is None else metrics | {"gold_reward": sum(scores) / count}

    def _export(self, engine: Engine, metrics: dict[str, float]) -> None:
        stage = self.stage
        state = engine.state_dict()
        if self.processes.is_main:
            card = model_card(
                name=stage.name,
                base_model=stage.model.path,
                objective=stage.objective.name,
                paper=stage.objective.paper,
                models={str(role): path for role, path in stage.models.items()},
                data=[source.path for source in stage.data.train],
                metrics=metrics,
                recipe=stage.resolved(),
                versions={package: installed_version(package) for package in PACKAGES},
            )
            export_model(engine.model, state, self.data.tokenizer, self.data.stop_ids, self.folder.final, card)
        self.processes.barrier()


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
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
