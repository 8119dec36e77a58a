"""What a stage measures while it trains: its loss on the eval data, and samples for its first prompts."""

from __future__ import annotations

from aligndistil.batch import Batch
from aligndistil.engine.engine import Engine
from aligndistil.objectives.base import Prepares
from aligndistil.recipe import Stage
from aligndistil.rollout import LoadedModel, SamplingParams, sample_seed
from aligndistil.run_folder import StageFolder
from aligndistil.training.batches import eval_batches
from aligndistil.training.data import GoldReward, StageData
from aligndistil.training.metrics import Sums
from aligndistil.training.preparation import prepare_mismatched
from aligndistil.training.samples import completion_metrics, sample_rows


class StageEvaluation:
    """Measures a stage on its eval data."""

    def __init__(
        self,
        stage: Stage,
        data: StageData,
        engine: Engine,
        policy: LoadedModel,
        folder: StageFolder,
        gold_reward: GoldReward | None,
    ) -> None:
        """Collates the eval data. On given responses an objective that prepares its own samples has no loss."""
        self.every = stage.evaluation.every
        self._stage, self._data, self._engine = stage, data, engine
        self._policy, self._folder, self._gold_reward = policy, folder, gold_reward
        self._batches: list[tuple[Batch, bool]] = []
        self._mismatched: list[tuple[Batch, bool]] = []
        prepares = stage.objective.prepares
        if data.eval is not None and prepares is not Prepares.ROLLOUT:
            size = stage.evaluation.batch_size or stage.train.micro_batch_size
            given = (data.eval, size, stage.evaluation.limit, data.tokenizer.pad_token_id, engine.processes)
            self._batches = eval_batches(*given)
            if prepares is Prepares.MISMATCHED:
                self._mismatched = eval_batches(*given, mismatches=True)
                self._batches = self._batches if self._mismatched else []

    def run(self, step: int) -> dict[str, float]:
        """Loss and metrics on the eval data after `step` steps, and of one sample for each of its first prompts."""
        metrics = evaluate(self._engine, self._batches, self._mismatched) if self._batches else {}
        samples = self._stage.evaluation.samples and not self._stage.objective.is_scalar
        return metrics | self._sampled(step) if samples and self._data.eval_prompts else metrics

    def _sampled(self, step: int) -> dict[str, float]:
        """Lengths and gold reward of one answer to each of the first eval prompts; the same seeds at every step."""
        settings, data, processes = self._stage.evaluation, self._data, self._engine.processes
        assert data.eval_prompts is not None
        count, world = min(settings.samples, len(data.eval_prompts)), processes.world
        # The same number on every process (see eval_batches); the answers beyond `count` are thrown away.
        mine = [i % count for i in range(processes.rank, -(-count // world) * world, world)]
        prompts = [data.eval_prompts.prompt_ids(i) for i in mine]
        seeds = [sample_seed(self._stage.train.seed, "eval", data.eval_prompts.key(i)) for i in mine]
        params = SamplingParams(settings.max_new_tokens or self._stage.data.max_response_length)
        samples = self._policy.sample(prompts, params, seeds)
        gathered = processes.gather(list(zip(mine, prompts, samples, strict=True)))
        unique = {i: (prompt, sample) for part in gathered for i, prompt, sample in part}
        prompts, answers = [unique[i][0] for i in range(count)], [unique[i][1] for i in range(count)]
        texts = self._policy.texts(answers)
        scores = None if self._gold_reward is None else self._gold_reward(texts)
        if processes.is_main:
            self._folder.eval_samples(step, sample_rows(data.tokenizer, prompts, answers, texts, scores))
        metrics = {name: float(total / number) for name, (total, number) in completion_metrics(answers).items()}
        return metrics if scores is None else metrics | {"gold_reward": sum(scores) / count}


def evaluate(
    engine: Engine, batches: list[tuple[Batch, bool]], mismatched: list[tuple[Batch, bool]] | None = None
) -> dict[str, float]:
    """Mean loss and metrics over all processes' batches; a batch marked False is evaluated and not counted."""
    prepared, sums = prepare_mismatched(engine, mismatched or [], {}), Sums()
    for batch, counts in batches:
        sums.add(engine.evaluate(batch, prepared.terms(0)), weight=float(counts))
    sums.reduce(engine.processes)
    return prepared.sums.means() | sums.means() | sums.maxima
