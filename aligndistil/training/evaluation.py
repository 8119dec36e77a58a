"""What a stage measures while it trains: its loss on the eval data, and samples for its first prompts."""

from __future__ import annotations

from dataclasses import dataclass

from aligndistil.batch import Batch
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.objectives.base import Prepares
from aligndistil.recipe import Stage
from aligndistil.rollout import SamplingParams, TransformersRollout, sample_seed
from aligndistil.run_folder import StageFolder
from aligndistil.training.batches import Share, eval_batches, sample_rows
from aligndistil.training.data import Scorer, StageData
from aligndistil.training.loop import evaluation_pass


@dataclass(frozen=True, slots=True)
class StageEvaluation:
    """Call it with the number of steps taken."""

    stage: Stage
    data: StageData
    engine: Engine
    rollout: TransformersRollout
    processes: Processes
    folder: StageFolder
    scorer: Scorer | None
    batches: list[tuple[Batch, bool]]
    mismatched: list[tuple[Batch, bool]]

    @classmethod
    def of(
        cls,
        stage: Stage,
        data: StageData,
        engine: Engine,
        rollout: TransformersRollout,
        processes: Processes,
        folder: StageFolder,
        scorer: Scorer | None,
    ) -> StageEvaluation:
        """Collates the eval data. On given responses an objective that prepares its own samples has no loss."""
        settings, pad_id, examples = stage.evaluation, data.tokenizer.pad_token_id, data.eval
        share = Share(processes.rank, processes.world, settings.batch_size or stage.train.micro_batch_size)
        prepares = stage.objective.prepares
        batches: list[tuple[Batch, bool]] = []
        others: list[tuple[Batch, bool]] = []
        if examples is not None and prepares is not Prepares.ROLLOUT:
            batches = eval_batches(examples, share, settings.limit, pad_id)
            if prepares is Prepares.MISMATCHED:
                others = eval_batches(examples, share, settings.limit, pad_id, mismatches=True)
                batches = batches if others else []
        return cls(stage, data, engine, rollout, processes, folder, scorer, batches, others)

    def __call__(self, step: int) -> dict[str, float]:
        metrics = {}
        if self.batches:
            metrics = evaluation_pass(self.engine, self.processes, self.batches, self.mismatched)
        samples = self.stage.evaluation.samples and not self.stage.objective.is_scalar
        return metrics | self._sampled(step) if samples and self.data.eval_prompts else metrics

    def _sampled(self, step: int) -> dict[str, float]:
        """Lengths and gold reward of one answer to each of the first eval prompts; the same seeds at every step."""
        settings, data = self.stage.evaluation, self.data
        assert data.eval_prompts is not None
        count, world = min(settings.samples, len(data.eval_prompts)), self.processes.world
        # The same number on every process (see eval_batches); the answers beyond `count` are thrown away.
        mine = [i % count for i in range(self.processes.rank, -(-count // world) * world, world)]
        prompts = [data.eval_prompts.prompt_ids(i) for i in mine]
        seeds = [sample_seed(self.stage.train.seed, "eval", data.eval_prompts.key(i)) for i in mine]
        params = SamplingParams(settings.max_new_tokens or self.stage.data.max_response_length)
        samples = self.rollout.generate(prompts, params, seeds)
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
