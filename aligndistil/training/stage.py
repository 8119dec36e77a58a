"""Train one stage, from its checkpoint where it has one, and leave its folder complete."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from aligndistil.engine.engine import Engine
from aligndistil.engine.memory import forget_peak_memory
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.models import Bases, base_of, export_adapter, export_model, located
from aligndistil.objectives.base import Expected, MetricInfo, Role
from aligndistil.objectives.loop_metrics import EVALUATION_METRICS, GOLD_REWARD, LOOP_METRICS
from aligndistil.progress import RunView
from aligndistil.recipe import Stage
from aligndistil.rollout import LoadedModel
from aligndistil.run_folder import StageFolder, adopt_loggers, license_of, model_card
from aligndistil.run_folder.environment import PACKAGES, installed_version
from aligndistil.stop import StopSignal
from aligndistil.training.adapters import models_on_bases
from aligndistil.training.batches import DataBatches, RolloutBatches, Schedule
from aligndistil.training.checkpoints import Checkpoints
from aligndistil.training.data import StageData, gold_reward_of, load_stage_data
from aligndistil.training.evaluation import StageEvaluation
from aligndistil.training.log import StageLog
from aligndistil.training.loop import train
from aligndistil.training.memory import MemoryCheck, models_of
from aligndistil.training.models import build_engine


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended."""

    steps: int
    seconds: float
    metrics: dict[str, float]
    """The last training and (as eval/...) evaluation metrics."""


class StageTraining:
    """Everything one stage needs, brought together once; `run` trains it."""

    def __init__(
        self,
        stage: Stage,
        folder: StageFolder,
        locate: Callable[[str], str],
        processes: Processes,
        initial: str = "",
    ) -> None:
        """Reads the data, and no weights. Raises UserError when the stage must not start with it.

        `initial` is the path of what its training goes back to, for `evaluation.kl_initial`.
        """
        self._initial = initial or stage.model.path
        self.stage, self.folder, self.locate, self.processes = stage, folder, locate, processes
        self.data: StageData = load_stage_data(stage, locate, rank=processes.rank)
        self.schedule = Schedule.of(stage, len(self.data.train))
        self.held = models_on_bases(stage, locate)
        """What each model is, by role, where adapters are trained."""
        self._given = None if stage.on_policy else DataBatches(stage, self.data, self.schedule, processes)

    def run(self, stop: StopSignal, view: RunView | None = None) -> Outcome:
        """Train to the end and export, shown in `view`; continues from the newest checkpoint in the folder."""
        stage, data, processes = self.stage, self.data, self.processes
        held = forget_peak_memory()
        adopt_loggers()
        bases = Bases(stage.model, stage.train.seed)
        engine = build_engine(stage, data, self.locate, processes, self.schedule.total_steps, bases)
        adopt_loggers()  # again: loading made new ones
        micro_batch, gold_reward = _rows_at_once(stage), gold_reward_of(stage.data)
        policy = LoadedModel(
            engine.model,
            data.tokenizer,
            data.stop_ids,
            engine.vocab,
            batch_size=stage.evaluation.batch_size or micro_batch,
            whole=engine.generating,
            synced=engine.zero_stage == 3 and processes.world > 1,
        )
        batches: DataBatches | RolloutBatches
        if self._given is not None:
            batches = self._given
        else:
            assert stage.rollout is not None
            sampled = replace(policy, batch_size=stage.rollout.batch_size or micro_batch)
            batches = RolloutBatches(
                stage, data.train, self.schedule, processes, sampled, gold_reward=gold_reward, write=self._write_samples
            )
        if stage.model.lora is not None:  # their dropout; a checkpoint brings its own random states
            torch.manual_seed(stage.train.seed * processes.world + processes.rank)
        reference = stage.models.get(Role.REFERENCE)
        start = self.locate(stage.model.path)
        starts_at_reference = reference is not None and self.locate(reference) == start
        if stage.model.lora is not None and stage.model.lora.dropout and base_of(start) is not None:
            starts_at_reference = False  # but for the dropout of the adapter, which a new one has no output to show
        with ExitStack() as stack:
            stack.callback(engine.close)
            stack.enter_context(stop.deferred())
            log = StageLog(stage, self.folder, self.schedule.total_steps, rank=processes.rank, view=view)
            state = train(
                stage.name,
                engine=engine,
                batches=batches,
                evaluation=StageEvaluation(
                    stage, data, engine, policy, self.folder, gold_reward, self._initial_model(engine, bases)
                ),
                log=stack.enter_context(log),
                checkpoints=Checkpoints(engine, self.folder.path, stage.checkpoint),
                stop=stop,
                expected=self._expected(engine) if starts_at_reference else (),
                memory=self._memory_check(held),
            )
            self._export(engine, state.last)
            return Outcome(state.step, state.seconds, state.last)

    def _memory_check(self, held: float) -> MemoryCheck | None:
        try:
            return MemoryCheck(self.stage, models_of(self.stage, self.locate), self.processes, held)
        except UserError:  # the Hub does not answer, say: no reason to stop a stage whose models are loaded
            return None

    def _expected(self, engine: Engine) -> list[Expected]:
        rounding = 20 if engine.model.dtype == torch.bfloat16 else 1
        first_step = self.stage.objective.first_step()
        return [expected._replace(tolerance=rounding * expected.tolerance) for expected in first_step]

    def _initial_model(self, engine: Engine, bases: Bases) -> FrozenModel | None:
        if not self.stage.evaluation.kl_initial or self.stage.objective.is_scalar:
            return None
        return engine.beside(bases.language_model(self.locate(self._initial)))

    def _write_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        logging = self.stage.logging
        logged = any(one % logging.every == 0 for one in range(step, step + self.schedule.steps_of_a_batch))
        if self.processes.is_main and logging.samples and logged:
            self.folder.samples(step, rows[: logging.samples])

    def _export(self, engine: Engine, metrics: dict[str, float]) -> None:
        adapter = self.stage.model.lora is not None
        state = engine.state_dict(trained_only=adapter)
        _note_scores(engine.model.config, metrics)
        if self.processes.is_main:
            model, start, card = self.stage.model, self.locate(self.stage.model.path), self._card(metrics)
            export = export_adapter if adapter else export_model
            export(engine.model, state, start, model, self.data.stop_ids, self.folder.final, card)
        self.processes.barrier()

    def _card(self, metrics: dict[str, float]) -> str:
        stage = self.stage
        place, revision = located(self.locate(stage.model.path))
        known = {**LOOP_METRICS, **GOLD_REWARD, **EVALUATION_METRICS, **stage.objective.metrics}
        headline = dict.fromkeys((*stage.objective.headline, *GOLD_REWARD, *EVALUATION_METRICS))
        return model_card(
            name=stage.name,
            base_model=stage.model.path,
            initial=self._initial,
            license=license_of(place, **revision),
            objective=stage.objective.name,
            scalar=stage.objective.is_scalar,
            on_policy=stage.on_policy,
            paper=stage.objective.paper,
            models={str(role): path for role, path in stage.models.items()},
            held=self.held,
            data=[source.path for source in stage.data.train],
            metrics=metrics,
            headline={name: known.get(name, MetricInfo("", "")) for name in headline},
            recipe=stage.resolved(),
            versions={package: installed_version(package) for package in PACKAGES},
        )


def _rows_at_once(stage: Stage) -> int:
    """Responses that are sampled at once where the recipe does not say: as many as a micro-batch has."""
    tokens, rollout = stage.train.micro_batch_tokens, stage.rollout
    if tokens is None:
        return stage.train.micro_batch_size
    longest = stage.data.max_response_length if rollout is None else rollout.max_new_tokens
    return max(1, tokens // (stage.data.max_prompt_length + longest))


def _note_scores(config: PretrainedConfig, metrics: dict[str, float]) -> None:
    """What a stage needs that normalizes the scores of this model, and not of the one that it started from."""
    for name in ("score_mean", "score_std"):
        if hasattr(config, name):
            delattr(config, name)
    mean, square = metrics.get("eval/scores/mean"), metrics.get("eval/scores/square")
    if mean is not None and square is not None:
        config.score_mean, config.score_std = mean, math.sqrt(max(square - mean**2, 0.0)) or 1.0
