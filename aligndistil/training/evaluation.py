"""What a stage measures while it trains: its loss on the eval data, and samples for its first prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.engine import Engine
from aligndistil.engine.policy import FrozenModel
from aligndistil.objectives.base import Prepares
from aligndistil.recipe import Stage
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from aligndistil.run_folder import StageFolder
from aligndistil.training.agreement import compare_sampling, what_to_do
from aligndistil.training.batches import StepBatch, eval_batches, micro_batches_of
from aligndistil.training.data import GoldReward, StageData
from aligndistil.training.metrics import Sums
from aligndistil.training.micro_batches import MicroBatches
from aligndistil.training.preparation import prepare_mismatched
from aligndistil.training.samples import completion_metrics, sample_rows, sampled_logps

logger = logging.getLogger(__name__)


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
        initial: FrozenModel | None = None,
    ) -> None:
        """Collates the eval data. On given responses an objective that prepares its own samples has no loss.

        `initial` is what the divergence of the answers is measured to; None where that is not asked for.
        """
        self.every = stage.evaluation.every
        self._stage, self._data, self._engine = stage, data, engine
        self._policy, self._folder, self._gold_reward, self._initial = policy, folder, gold_reward, initial
        self._batches: list[tuple[Batch, bool]] = []
        self._mismatched: list[tuple[Batch, bool]] = []
        self._compared = False
        prepares = stage.objective.prepares
        if data.eval is not None and prepares is not Prepares.ROLLOUT:
            size = stage.evaluation.batch_size
            micro = micro_batches_of(stage.train) if size is None else MicroBatches(size)
            given = (data.eval, micro, stage.evaluation.limit, data.tokenizer.pad_token_id, engine.processes)
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
        """What one answer to each of the first eval prompts is like; the same seeds at every step."""
        settings, data, processes = self._stage.evaluation, self._data, self._engine.processes
        assert data.eval_prompts is not None
        count, world = min(settings.samples, len(data.eval_prompts)), processes.world
        # The same number on every process (see eval_batches); the answers beyond `count` are thrown away.
        mine = [i % count for i in range(processes.rank, -(-count // world) * world, world)]
        prompts = [data.eval_prompts.prompt_ids(i) for i in mine]
        seeds = [sample_seed(self._stage.train.seed, "eval", data.eval_prompts.key(i)) for i in mine]
        longest = settings.max_new_tokens or self._stage.data.max_response_length
        params = SamplingParams(longest, logps=not self._compared)
        samples = self._policy.sample(prompts, params, seeds)
        if not self._compared:
            self._compare(prompts, samples)
        self._compared = True
        gathered = processes.gather(list(zip(mine, prompts, samples, strict=True)))
        unique = {i: (prompt, sample) for part in gathered for i, prompt, sample in part}
        prompts, answers = [unique[i][0] for i in range(count)], [unique[i][1] for i in range(count)]
        texts = self._policy.texts(answers)
        scores = None if self._gold_reward is None else self._gold_reward(texts)
        if processes.is_main:
            self._folder.eval_samples(step, sample_rows(data.tokenizer, prompts, answers, texts, scores))
        metrics = {name: float(total / number) for name, (total, number) in completion_metrics(answers).items()}
        if scores is not None:
            metrics["gold_reward"] = sum(scores) / count
        if self._initial is not None:
            metrics["kl_initial"] = self._divergence(self._initial, prompts, answers)
        return metrics

    def _compare(self, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> None:
        """Say where this is no sampling from the policy. It ends no training, which may be of given responses."""
        rows = [Row(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
        batch = collate(rows, DataKind.RESPONSES, self._data.tokenizer.pad_token_id)
        cut = MicroBatches(self._policy.batch_size).cut([end for _, end in batch.spans])
        compared = StepBatch(batch, batch.rows, [cut], sampled_logp_BT=sampled_logps(batch, samples))
        if problem := compare_sampling(self._engine, compared).problem:
            advice = what_to_do("evaluation.batch_size")
            logger.warning("stage %s: evaluation.samples: %s; %s", self._stage.name, problem, advice)

    def _divergence(self, initial: FrozenModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sample]) -> float:
        """Mean over answers of KL(policy || initial) in nats per response. Every process reads its share."""
        processes, size = self._engine.processes, self._policy.batch_size
        rows = [Row(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
        shares = [rows[rank :: processes.world] for rank in range(processes.world)]
        mine = shares[processes.rank]
        total = torch.zeros(1, dtype=torch.double)
        for start in range(0, len(shares[0]), size):  # as many batches on every process: ZeRO-3 gathers in each
            part = mine[start : start + size]
            batch = collate(part or rows[:1], DataKind.RESPONSES, self._data.tokenizer.pad_token_id)
            divergence = self._engine.divergence(batch, initial)
            total += divergence.double().sum().cpu() if part else 0.0
        return float(processes.sum(total.to(processes.device))) / len(rows)


def evaluate(
    engine: Engine, batches: list[tuple[Batch, bool]], mismatched: list[tuple[Batch, bool]] | None = None
) -> dict[str, float]:
    """Mean loss and metrics over all processes' batches; a batch marked False is evaluated and not counted."""
    prepared, sums = prepare_mismatched(engine, mismatched or [], {}), Sums()
    for batch, counts in batches:
        terms = prepared.terms(range(batch.rows), batch.width)
        sums.add(engine.evaluate(batch, terms), weight=float(counts))
    sums.reduce(engine.processes)
    return prepared.sums.means() | sums.means() | sums.maxima
