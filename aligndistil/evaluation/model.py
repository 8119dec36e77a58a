"""Measure models on the same held-out prompts and pairs, with the same seeds, so that their rows can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.policy import FrozenModel, Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.evaluation.samples import decode, summarise
from aligndistil.evaluation.terms import Divergence, LogRatio, sequence_sums
from aligndistil.models import shared_vocab
from aligndistil.rollout import Sample, SamplingParams, TransformersRollout, sample_seed

Scorer = Callable[[Sequence[str]], list[float]]
"""Texts of responses to rewards."""


@dataclass(frozen=True, slots=True)
class ModelToEvaluate:
    """A model and those it is compared with; they may be the same object."""

    model: PreTrainedModel
    initial: PreTrainedModel
    """What training started from: the implicit reward of a pair is the log-ratio to it."""
    kl_to: PreTrainedModel


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics of one model, and the samples they were measured on."""

    metrics: dict[str, float]
    samples: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The prompts, pairs and settings that all models of a table share. `measure` is collective."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    prompts: Sequence[Sequence[int]]
    pairs: Sequence[Sequence[Row]]
    """Chosen and rejected, each pair."""
    params: SamplingParams
    batch_size: int
    seed: int
    processes: Processes
    scorer: Scorer | None
    on_rows: Callable[[int], None] = lambda rows: None
    """Told of rows that were generated or scored."""

    def measure(self, subject: ModelToEvaluate) -> Measured:
        """Reward accuracy on the pairs; reward, divergence and length of one sample per prompt."""
        models = [subject.model, subject.initial, subject.kl_to]
        vocab = shared_vocab(models, self.tokenizer)
        policy = Policy(on_device(subject.model, self.processes.device).eval(), vocab)
        frozen = {id(m): FrozenModel(on_device(m, self.processes.device), vocab) for m in models[1:]}
        metrics: dict[str, float] = {}
        # The implicit reward of the initial model itself is 0 for every response: there is nothing to rank by.
        if self.pairs and subject.model is not subject.initial:
            metrics["reward_accuracy"] = self._accuracy(policy, frozen[id(subject.initial)])
        if not self.prompts:
            return Measured(metrics, [])
        mine, samples = self._answers(subject.model, vocab)
        rows = [Row(self.prompts[i], sample.token_ids) for i, sample in zip(mine, samples, strict=True)]
        batches = self._batches(rows)
        device = self.processes.device
        kl = sequence_sums(Divergence(), policy, frozen[id(subject.kl_to)], batches, device)
        kl_initial = sequence_sums(Divergence(), policy, frozen[id(subject.initial)], batches, device)
        everything = self.processes.gather(list(zip(mine, samples, kl, kl_initial, strict=True)))
        return self._together(metrics, sorted((part for parts in everything for part in parts), key=lambda p: p[0]))

    def _together(self, metrics: dict[str, float], parts: list[tuple[int, Sample, float, float]]) -> Measured:
        samples = [sample for _, sample, _, _ in parts]
        texts = decode(self.tokenizer, samples)
        metrics |= {
            "kl": sum(kl for _, _, kl, _ in parts) / len(parts),
            "kl_initial": sum(kl for *_, kl in parts) / len(parts),
            **summarise(samples, texts),
        }
        shown: list[dict[str, object]] = [
            {"prompt": self.tokenizer.decode(list(self.prompts[i])), "response": text, "finished": sample.finished}
            for (i, sample, _, _), text in zip(parts, texts, strict=True)
        ]
        if self.scorer is not None:
            scores = self.scorer(texts)
            metrics["gold_reward"] = sum(scores) / len(scores)
            for row, score in zip(shown, scores, strict=True):
                row["gold_reward"] = score
        return Measured(metrics, shown)

    def _accuracy(self, policy: Policy, initial: FrozenModel) -> float:
        """Share of pairs whose chosen response has the larger log-ratio to the initial model; a tie is wrong."""
        pairs = self.pairs[self.processes.rank :: self.processes.world]
        rows = [row for pair in pairs for row in pair]
        ratios = sequence_sums(LogRatio(), policy, initial, self._batches(rows), self.processes.device)
        right = [a > b for a, b in zip(ratios[0::2], ratios[1::2], strict=True)]
        gathered: list[bool] = [r for part in self.processes.gather(right) for r in part]
        return sum(gathered) / len(gathered)

    def _answers(self, model: PreTrainedModel, vocab: int) -> tuple[list[int], list[Sample]]:
        mine = list(range(len(self.prompts)))[self.processes.rank :: self.processes.world]
        rollout = TransformersRollout(
            lambda: nullcontext(model),
            self.stop_ids,
            self.tokenizer.pad_token_id,
            vocab,
            self.batch_size,
            self.on_rows,
        )
        seeds = [sample_seed(self.seed, "report", i) for i in mine]
        return mine, rollout.generate([self.prompts[i] for i in mine], self.params, seeds)

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        size = self.batch_size
        return [
            collate(rows[start : start + size], DataKind.RESPONSES, self.tokenizer.pad_token_id)
            for start in range(0, len(rows), size)
        ]
