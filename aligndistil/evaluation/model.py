"""Measure models on the same held-out prompts and pairs, with the same seeds, so that their rows can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from transformers import PreTrainedModel

from aligndistil.batch import Row
from aligndistil.engine.policy import FrozenModel, Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import Scorer as RewardModel
from aligndistil.evaluation.bench import Bench, Pairs
from aligndistil.evaluation.samples import decode, summarise
from aligndistil.evaluation.terms import Divergence, LogProbability, response_scores, sequence_sums
from aligndistil.models import shared_vocab
from aligndistil.objectives.base import Objective, Role
from aligndistil.rollout import Sample, SamplingParams, TransformersRollout, sample_seed

Scorer = Callable[[Sequence[str]], list[float]]
"""Texts of responses to rewards."""
PairValues: TypeAlias = tuple[float, float]
"""What a model says of the chosen and of the rejected response of a pair."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ModelToEvaluate:
    """A language model and those it is compared with; they may be the same object."""

    model: PreTrainedModel
    initial: PreTrainedModel
    """What training started from."""
    kl_to: PreTrainedModel


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics of one model, and what they were measured on."""

    metrics: dict[str, float]
    pairs: dict[str, list[PairValues]] = field(default_factory=dict)
    """By split: log-probabilities summed over the response, or scores of a scalar head."""
    samples: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What all models of a table are asked, and how. Measuring is collective."""

    bench: Bench
    given: Sequence[Row]
    """Responses of the data: divergences are measured on them too."""
    params: SamplingParams
    batch_size: int
    seed: int
    processes: Processes
    scorer: Scorer | None = None
    """The exact reward of a text."""
    reward: RewardModel | None = None
    """Scores the samples; on this process's device."""

    def measure(self, subject: ModelToEvaluate) -> Measured:
        """Log-probabilities of the pairs, divergences, and what one sample for each prompt is like."""
        models = [subject.model, subject.initial, subject.kl_to]
        vocab = shared_vocab(models, self.bench.tokenizer)
        device = self.processes.device
        policy = Policy(on_device(subject.model, device).eval(), vocab)
        others: dict[str, FrozenModel] = {Role.REFERENCE: FrozenModel(on_device(subject.initial, device), vocab)}
        if subject.kl_to is not subject.initial:
            others[Role.TEACHER] = FrozenModel(on_device(subject.kl_to, device), vocab)
        pairs = self._of_pairs(self.bench.pairs, lambda rows: self._sums(LogProbability(), policy, {}, rows)["logp"])
        metrics = self._divergences(policy, others, self.given, "_data")
        if not self.bench.prompts:
            return Measured(metrics, pairs)
        samples = self._share_out(len(self.bench.prompts), lambda places: self._answers(subject.model, vocab, places))
        rows = [Row(prompt, sample.token_ids) for prompt, sample in zip(self.bench.prompts, samples, strict=True)]
        texts = decode(self.bench.tokenizer, samples)
        rewards = self._rewards(rows, texts)
        metrics = self._divergences(policy, others, rows) | metrics | summarise(samples, texts)
        metrics |= {name: _mean(values) for name, values in rewards.items()}
        return Measured(metrics, pairs, self._shown(samples, texts, rewards))

    def measure_scores(self, model: RewardModel, name: str) -> Measured:
        """All that a model with a scalar head says: its scores of the pairs."""
        pairs = self.bench.foreign_pairs.get(name, self.bench.pairs)
        return Measured({}, self._of_pairs(pairs, lambda rows: self._scores(model, rows)))

    def _of_pairs(self, given: Pairs, read: Callable[[Sequence[Row]], list[float]]) -> dict[str, list[PairValues]]:
        found: dict[str, list[PairValues]] = {}
        for split, pairs in given.items():
            values = self._on_rows([row for pair in pairs for row in pair], read)
            found[split] = list(zip(values[0::2], values[1::2], strict=True))
        return found

    def _divergences(
        self, policy: Policy, others: Mapping[str, FrozenModel], rows: Sequence[Row], suffix: str = ""
    ) -> dict[str, float]:
        """Means over rows of the sequence sums of KL(policy || other); none without rows."""
        if not rows:
            return {}
        measure = Divergence(others=tuple(others))

        def read(mine: Sequence[Row]) -> list[dict[str, float]]:
            sums = self._sums(measure, policy, others, mine)
            return [dict(zip(sums, values, strict=True)) for values in zip(*sums.values(), strict=True)]

        each = self._on_rows(rows, read)
        means = {role: _mean([row[role] for row in each]) for role in others}
        initial = means[Role.REFERENCE]
        return {f"kl{suffix}": means.get(Role.TEACHER, initial), f"kl_initial{suffix}": initial}

    def _rewards(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float]]:
        found = {}
        if self.scorer is not None:
            found["gold_reward"] = self.scorer(texts)
        if self.reward is not None:
            reward = self.reward
            found["reward_score"] = self._on_rows(rows, lambda mine: self._scores(reward, mine))
        return found

    def _shown(
        self, samples: Sequence[Sample], texts: Sequence[str], rewards: Mapping[str, Sequence[float]]
    ) -> list[dict[str, object]]:
        shown: list[dict[str, object]] = []
        for i, (prompt, sample) in enumerate(zip(self.bench.prompts, samples, strict=True)):
            asked = self.bench.tokenizer.decode(list(prompt))
            row = {"prompt": asked, "response": texts[i], "finished": sample.finished}
            shown.append(row | {name: values[i] for name, values in rewards.items()})
        return shown

    def _answers(self, model: PreTrainedModel, vocab: int, places: Sequence[int]) -> list[Sample]:
        rollout = TransformersRollout(
            lambda: nullcontext(model), self.bench.stop_ids, self.bench.tokenizer.pad_token_id, vocab, self.batch_size
        )
        seeds = [sample_seed(self.seed, "report", place) for place in places]
        return rollout.generate([self.bench.prompts[place] for place in places], self.params, seeds)

    def _sums(
        self, measure: Objective, policy: Policy, others: Mapping[str, FrozenModel], rows: Sequence[Row]
    ) -> dict[str, list[float]]:
        pad, device = self.bench.tokenizer.pad_token_id, self.processes.device
        return sequence_sums(measure, policy, others, rows, batch_size=self.batch_size, pad_id=pad, device=device)

    def _scores(self, model: RewardModel, rows: Sequence[Row]) -> list[float]:
        pad, device = self.bench.tokenizer.pad_token_id, self.processes.device
        return response_scores(model, rows, batch_size=self.batch_size, pad_id=pad, device=device)

    def _on_rows(self, rows: Sequence[Row], read: Callable[[Sequence[Row]], list[_Result]]) -> list[_Result]:
        return self._share_out(len(rows), lambda places: read([rows[place] for place in places]))

    def _share_out(self, count: int, work: Callable[[Sequence[int]], list[_Result]]) -> list[_Result]:
        """Every process works on its own of the places 0..count - 1; all are given all results, in order."""
        world = self.processes.world
        mine = range(self.processes.rank, count, world)
        parts: list[list[_Result]] = self.processes.gather(work(mine) if mine else [])
        return [parts[place % world][place // world] for place in range(count)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
