"""Measure models on the same held-out prompts and pairs, with the same seeds, so that their rows can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from aligndistil.batch import Batch, Row
from aligndistil.engine.divergence import Divergence
from aligndistil.engine.policy import FrozenModel, Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import Scorer
from aligndistil.errors import DivergedError
from aligndistil.evaluation.measurements import EvalSet, Pairs
from aligndistil.evaluation.rows import last_scores, log_probabilities, read_rows, summed_terms
from aligndistil.evaluation.samples import distinct_n, values_of_samples
from aligndistil.models import shared_vocab
from aligndistil.objectives.base import Role
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from aligndistil.training.agreement import LIMITS, what_to_do

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The metrics of one model, and what they were measured on."""

    metrics: dict[str, float]
    values: dict[str, list[float]] = field(default_factory=dict)
    """What those metrics that are means are the mean of, prompt by prompt (`..._data`: response by response)."""
    pairs: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """By split, of the chosen and the rejected response of each pair: the log-probability summed over its tokens, or
    the score of a scalar head."""
    samples: list[dict[str, object]] = field(default_factory=list)
    """Prompt and response as text, and the response's rewards."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Measures models on one eval set. Measuring is collective: processes share the rows, and all get all results."""

    eval_set: EvalSet
    params: SamplingParams
    batch_size: int
    seed: int
    processes: Processes
    gold_reward: Callable[[Sequence[str]], list[float]] | None = None
    """The exact reward of texts."""
    reward_model: Scorer | None = None
    """Scores the samples; on this process's device."""

    def measure(self, model: PreTrainedModel, *, initial: PreTrainedModel, kl_to: PreTrainedModel) -> EvalResult:
        """Log-probabilities of the pairs, divergences, and what one sample for each prompt is like.

        `initial` is what training began from; the three models may be the same object.
        """
        prompts, tokenizer, device = self.eval_set.prompts, self.eval_set.tokenizer, self.processes.device
        vocab = shared_vocab([model, initial, kl_to], tokenizer)
        policy = Policy(on_device(model, device).eval(), vocab)
        frozen: dict[str, FrozenModel] = {Role.REFERENCE: FrozenModel(on_device(initial, device), vocab)}
        if kl_to is not initial:
            frozen[Role.TEACHER] = FrozenModel(on_device(kl_to, device), vocab)
        pairs = self._pairs(self.eval_set.pairs, lambda batch: log_probabilities(policy, batch))
        values = self._divergences(policy, frozen, self.eval_set.responses, "_data")
        if not prompts:
            return EvalResult(_means(values), values, pairs)
        loaded = LoadedModel(model, tokenizer, self.eval_set.stop_ids, vocab, self.batch_size)

        def answers(places: Sequence[int]) -> list[Sample]:
            seeds = [sample_seed(self.seed, "report", place) for place in places]
            params = replace(self.params, logps=True)
            return loaded.sample([prompts[place] for place in places], params, seeds)

        samples = self._share(len(prompts), answers)
        rows = [Row(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
        read = self._of_rows(rows, lambda batch: log_probabilities(policy, batch))
        _refuse_samples_of_another(model, samples, [logp for (logp,) in read])
        texts = [text.strip() for text in loaded.texts(samples)]
        rewards: dict[str, list[float]] = {}
        if self.gold_reward is not None:
            rewards["gold_reward"] = self.gold_reward(texts)
        if (reward_model := self.reward_model) is not None:
            scores = self._of_rows(rows, lambda batch: last_scores(reward_model, batch))
            rewards["reward_score"] = [score for (score,) in scores]
        values = self._divergences(policy, frozen, rows) | values | values_of_samples(samples, texts) | rewards
        token_ids = [sample.token_ids for sample in samples]
        metrics = _means(values) | {f"distinct_{n}": distinct_n(token_ids, n) for n in (1, 2)}
        shown: list[dict[str, object]] = [
            {"prompt": tokenizer.decode(list(prompt)), "response": text, "finished": sample.finished}
            | {name: of_samples[i] for name, of_samples in rewards.items()}
            for i, (prompt, text, sample) in enumerate(zip(prompts, texts, samples, strict=True))
        ]
        return EvalResult(metrics, values, pairs, shown)

    def measure_pairs(self, model: PreTrainedModel) -> EvalResult:
        """Log-probabilities of the pairs alone: all that is needed of a model that others are compared with."""
        vocab = shared_vocab([model], self.eval_set.tokenizer)
        policy = Policy(on_device(model, self.processes.device).eval(), vocab)
        return EvalResult({}, {}, self._pairs(self.eval_set.pairs, lambda batch: log_probabilities(policy, batch)))

    def measure_scores(self, model: Scorer, name: str) -> EvalResult:
        """What there is to measure of a scalar head, the model of row `name`: its scores of the pairs."""
        pairs = self.eval_set.pairs_by_tokenizer.get(name, self.eval_set.pairs)
        return EvalResult({}, {}, self._pairs(pairs, lambda batch: last_scores(model, batch)))

    def _pairs(self, by_split: Pairs, read: Callable[[Batch], Tensor]) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for split, pairs in by_split.items():
            values = [value for (value,) in self._of_rows([row for pair in pairs for row in pair], read)]
            found[split] = list(zip(values[0::2], values[1::2], strict=True))
        return found

    def _divergences(
        self, policy: Policy, frozen: Mapping[str, FrozenModel], rows: Sequence[Row], suffix: str = ""
    ) -> dict[str, list[float]]:
        """Of each row, the sequence sum of KL(policy || other); none without rows."""
        if not rows:
            return {}
        divergence = Divergence(others=tuple(frozen))
        of_rows = self._of_rows(rows, lambda batch: summed_terms(divergence, policy, frozen, batch))
        columns = [list(column) for column in zip(*of_rows, strict=True)]
        return {f"kl{suffix}": columns[-1], f"kl_initial{suffix}": columns[0]}

    def _of_rows(self, rows: Sequence[Row], read: Callable[[Batch], Tensor]) -> list[list[float]]:
        """See `read_rows`; each process reads its own."""
        pad_token_id: int = self.eval_set.tokenizer.pad_token_id

        def of_places(places: Sequence[int]) -> list[list[float]]:
            own, device = [rows[i] for i in places], self.processes.device
            return read_rows(own, read, batch_size=self.batch_size, pad_token_id=pad_token_id, device=device)

        return self._share(len(rows), of_places)

    def _share(self, count: int, work: Callable[[Sequence[int]], list[_Result]]) -> list[_Result]:
        """Every process works on its own of the places 0 .. count - 1; all are given all results, in order."""
        world = self.processes.world
        places = range(self.processes.rank, count, world)
        parts: list[list[_Result]] = self.processes.gather(work(places) if places else [])
        return [parts[place % world][place // world] for place in range(count)]


def _refuse_samples_of_another(model: PreTrainedModel, samples: Sequence[Sample], logps: Sequence[float]) -> None:
    """Compare what generation says of whole responses with their log-probabilities when they are read."""
    pairs = [(sum(sample.logps), logp, len(sample.token_ids)) for sample, logp in zip(samples, logps, strict=True)]
    off = [abs(generated - read) / tokens for generated, read, tokens in pairs]
    if not sum(off) / len(off) <= LIMITS[model.dtype]:
        generated, read, _ = pairs[off.index(max(off))]
        raise DivergedError(
            f"model {model.config.name_or_path!r} does not sample what it means: generation gives its samples other "
            f"log-probabilities than reading them does, by {sum(off) / len(off):.2g} nats a token on average and "
            f"{max(off):.2g} at most ({generated:.2f} against {read:.2f} for that response), and "
            f"{LIMITS[model.dtype]:g} may be rounding; {what_to_do('report.batch_size')}"
        )


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(of_prompts) / len(of_prompts) for name, of_prompts in values.items()}
