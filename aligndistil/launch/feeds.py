"""Where a step's micro-batches come from: the data, or samples of the policy that is being trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.data import Examples, Sampler
from aligndistil.maths import Metric
from aligndistil.rollout import Sample, SamplingParams, TransformersRollout, sample_seed
from aligndistil.train import StepData

Scorer = Callable[[Sequence[str]], list[float]]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a global batch that falls to this process."""

    rank: int
    world: int
    micro_batch_size: int


@dataclass(frozen=True, slots=True)
class DataFeed:
    """Batches read from the data."""

    examples: Examples
    sampler: Sampler
    share: Share
    pad_id: int

    def __call__(self, step: int) -> StepData:
        parts = self.sampler.micro_batches(step, self.share.rank, self.share.world, self.share.micro_batch_size)
        batches = [
            collate([row for i in part for row in self.examples.rows(i)], self.examples.kind, self.pad_id)
            for part in parts
        ]
        return StepData(batches, self.sampler.batch_size)


@dataclass(frozen=True, slots=True)
class RolloutFeed:
    """Batches of responses that the live policy gives to the prompts of the data, one optimizer step per rollout."""

    examples: Examples
    sampler: Sampler
    """Of prompts."""
    share: Share
    tokenizer: PreTrainedTokenizerBase
    rollout: TransformersRollout
    params: SamplingParams
    samples_per_prompt: int
    seed: int
    scorer: Scorer | None
    show: Callable[[int, list[dict[str, Any]]], None]
    """Told the step and rank 0's responses, as rows to write."""

    def __call__(self, step: int) -> StepData:
        asked = self._asked(step)
        per_rank = len(asked) // self.share.world
        mine = asked[self.share.rank * per_rank : (self.share.rank + 1) * per_rank]
        prompts = [self.examples.prompt_ids(i) for i, _ in mine]
        seeds = [sample_seed(self.seed, step, self.examples.key(i), k) for i, k in mine]
        began = time.perf_counter()
        samples = self.rollout.generate(prompts, self.params, seeds)
        seconds = time.perf_counter() - began
        rows = [Row(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
        size = self.share.micro_batch_size
        batches = [
            collate(rows[start : start + size], DataKind.RESPONSES, self.tokenizer.pad_token_id)
            for start in range(0, len(rows), size)
        ]
        metrics = self._metrics(samples, seconds) | self._scores(step, prompts, samples)
        return StepData(batches, len(asked), metrics)

    def _asked(self, step: int) -> list[tuple[int, int]]:
        """(example, number of the sample) of the step, over all processes.

        A prompt that stands in a batch twice, where epochs meet or a source is repeated, gets different samples.
        """
        counts = Counter[str]()
        asked = []
        for i in self.sampler.batch(step):
            for _ in range(self.samples_per_prompt):
                asked.append((i, counts[self.examples.key(i)]))
                counts[self.examples.key(i)] += 1
        return asked

    def _metrics(self, samples: Sequence[Sample], seconds: float) -> dict[str, Metric]:
        count = torch.tensor(float(len(samples)))
        tokens = torch.tensor(float(sum(len(sample.token_ids) for sample in samples)))
        truncated = torch.tensor(float(sum(not sample.finished for sample in samples)))
        return {
            "completions/mean_length": Metric(tokens, count),
            "completions/truncated_fraction": Metric(truncated, count),
            "rollout/tokens_per_second": Metric(tokens, torch.tensor(seconds / self.share.world)),
        }

    def _scores(self, step: int, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> dict[str, Metric]:
        """Write the samples down; where the data knows a gold reward, measure it."""
        texts = self.tokenizer.batch_decode([list(s.token_ids) for s in samples], skip_special_tokens=True)
        scores = None if self.scorer is None else self.scorer(texts)
        rows = sample_rows(self.tokenizer, prompts, samples, texts, scores)
        self.show(step + 1, rows)
        if scores is None:
            return {}
        return {"gold_reward": Metric(torch.tensor(sum(scores)), torch.tensor(float(len(scores))))}


def sample_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    texts: Sequence[str],
    scores: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """Samples as they are written to `samples/`: texts for people, token ids for programs."""
    rows = []
    for i, (prompt, sample, text) in enumerate(zip(prompts, samples, texts, strict=True)):
        row = {
            "prompt": tokenizer.decode(list(prompt)),
            "response": text,
            "finished": sample.finished,
            "token_ids": list(sample.token_ids),
        }
        rows.append(row if scores is None else {**row, "gold_reward": scores[i]})
    return rows


def eval_batches(examples: Examples, share: Share, limit: int | None, pad_id: int) -> list[tuple[Batch, bool]]:
    """This process's part of the eval data in batches, and whether each counts.

    ZeRO-3 gathers weights in every forward pass, so all processes need the same number of batches: one that has run out
    repeats the first, which then does not count.
    """
    count = min(len(examples), limit or len(examples))
    size = share.micro_batch_size
    starts = range(0, count, size)
    rounds = -(-len(starts) // share.world)
    batches = []
    for number in range(share.rank, rounds * share.world, share.world):
        counts = number < len(starts)
        start = starts[number] if counts else 0
        rows = [row for i in range(start, min(start + size, count)) for row in examples.rows(i)]
        batches.append((collate(rows, examples.kind, pad_id), counts))
    return batches
