"""Where a step's micro-batches come from: the data, or samples of the policy that is being trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.data import Examples, Sampler
from aligndistil.errors import UserError
from aligndistil.maths import Metric
from aligndistil.rollout import Sample, SamplingParams, TransformersRollout, sample_seed
from aligndistil.training.data import Scorer
from aligndistil.training.loop import Round


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
    mismatches: bool = False
    """Whether each step also has its prompts with other examples' responses."""

    def __call__(self, step: int) -> Round:
        parts = self.sampler.micro_batches(step, self.share.rank, self.share.world, self.share.micro_batch_size)
        batches = [
            collate([row for i in part for row in self.examples.rows(i)], self.examples.kind, self.pad_id)
            for part in parts
        ]
        return Round(batches, self.sampler.batch_size, mismatched=self._mismatched(step) if self.mismatches else ())

    def _mismatched(self, step: int) -> list[Batch]:
        rows = mismatched([row for i in self.sampler.batch(step) for row in self.examples.rows(i)])
        assert rows is not None  # check() has seen every step
        size = self.share.micro_batch_size
        per_rank = len(rows) // self.share.world
        mine = rows[self.share.rank * per_rank : (self.share.rank + 1) * per_rank]
        return [collate(mine[i : i + size], self.examples.kind, self.pad_id) for i in range(0, len(mine), size)]

    def check(self, steps: int) -> None:
        """Raises UserError when a step has no mismatched rows to offer."""
        if not self.mismatches:
            return
        for step in range(steps):
            if mismatched([row for i in self.sampler.batch(step) for row in self.examples.rows(i)]) is None:
                raise UserError(
                    f"train.batch_size: all {self.sampler.batch_size} examples of step {step + 1} have the same "
                    "prompt, so that none can be compared with another's response; raise it, or give more prompts"
                )


def mismatched(rows: Sequence[Row]) -> list[Row] | None:
    """Each prompt with the response of the next row that has another prompt; None when all prompts are the same."""
    prompts = [tuple(row.prompt_ids) for row in rows]
    if len(set(prompts)) < 2:
        return None
    others = []
    for i, prompt in enumerate(prompts):
        after = (rows[(i + k) % len(rows)] for k in range(1, len(rows)) if prompts[(i + k) % len(rows)] != prompt)
        others.append(Row(rows[i].prompt_ids, next(after).response_ids, rows[i].label))
    return others


@dataclass(frozen=True, slots=True)
class RolloutFeed:
    """Batches of responses that the live policy gives to the prompts of the data."""

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
    minibatches: int = 1
    """Optimizer steps of one pass over a rollout."""
    passes: int = 1

    @property
    def updates(self) -> int:
        """Optimizer steps on one rollout."""
        return self.minibatches * self.passes

    def __call__(self, step: int) -> Round:
        number = step // self.updates
        asked = self._asked(number)
        mine = self._mine(asked)
        prompts = [self.examples.prompt_ids(i) for i, _ in mine]
        seeds = [sample_seed(self.seed, number, self.examples.key(i), k) for i, k in mine]
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
        examples = len(asked) // self.minibatches
        return Round(batches, examples, metrics, updates=self._updates(number, len(batches)))

    def _mine(self, asked: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """This process's part of each optimizer step, so that what a step sees does not depend on `world`."""
        each = len(asked) // self.minibatches
        share, rank = each // self.share.world, self.share.rank
        starts = range(rank * share, len(asked), each)
        return [one for start in starts for one in asked[start : start + share]]

    def _updates(self, number: int, micro_batches: int) -> list[list[int]]:
        """Micro-batches of each optimizer step; later passes exchange them between steps, by the seed.

        Each stays at its place within a step, and with it on its process, so that `world` changes nothing here either.
        """
        each = micro_batches // self.minibatches
        updates = []
        for k in range(self.passes):
            steps = [list(range(self.minibatches)) for _ in range(each)]
            if k > 0:
                places = range(self.share.rank * each, (self.share.rank + 1) * each)
                orders = (np.random.default_rng([self.seed, number, k, place]) for place in places)
                steps = [order.permutation(self.minibatches).tolist() for order in orders]
            updates += [[steps[i][m] * each + i for i in range(each)] for m in range(self.minibatches)]
        return updates

    def _asked(self, step: int) -> list[tuple[int, int]]:
        """(example, number of the sample) of a rollout, over all processes.

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


def eval_batches(
    examples: Examples, share: Share, limit: int | None, pad_id: int, *, mismatches: bool = False
) -> list[tuple[Batch, bool]]:
    """This process's part of the eval data in batches, and whether each counts.

    With `mismatches` the prompts have each other's responses; none are there when all prompts are the same.
    ZeRO-3 gathers weights in every forward pass, so all processes need the same number of batches: one that has run out
    repeats the first, which then does not count.
    """
    count = min(len(examples), limit or len(examples))
    each = [examples.rows(i) for i in range(count)]
    if mismatches:
        each = [[row] for row in mismatched([row for rows in each for row in rows]) or []]
    size = share.micro_batch_size
    starts = range(0, len(each), size)
    rounds = -(-len(starts) // share.world)
    batches = []
    for number in range(share.rank, rounds * share.world, share.world):
        counts = number < len(starts)
        start = starts[number] if counts else 0
        rows = [row for some in each[start : start + size] for row in some]
        batches.append((collate(rows, examples.kind, pad_id), counts))
    return batches
