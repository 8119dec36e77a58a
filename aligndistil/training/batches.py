"""Where a step's micro-batches come from: the data, or samples of the policy that is being trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.data import Examples, Sampler
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.maths import Metric
from aligndistil.objectives.base import Prepares
from aligndistil.recipe import Stage, Train
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from aligndistil.training.data import GoldReward, StageData
from aligndistil.training.micro_batches import MicroBatches
from aligndistil.training.samples import completion_metrics, sample_rows, sampled_logps


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A global batch with one optimizer step, or a rollout with several, as one process sees it."""

    batch: Batch
    """All rows of this process, in the processor's memory."""
    examples: int
    """Of one optimizer step over all processes: what its loss is averaged over."""
    steps: Sequence[Sequence[Sequence[int]]]
    """The micro-batches of each optimizer step, each the rows of `batch` that are in it."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """What making the batch measured (a rollout's lengths, say)."""
    passes: int = 1
    """How often the steps go through all rows."""
    mismatched: Sequence[Batch] = ()
    """Micro-batches, for an objective that prepares on mismatched rows."""
    sampled_logp_BT: Tensor | None = None
    """The log-probabilities of generation, where training's are compared with them."""

    @property
    def all_examples(self) -> int:
        """Different examples over all processes, however many optimizer steps see each."""
        return self.examples * len(self.first_pass)

    @property
    def first_pass(self) -> Sequence[Sequence[Sequence[int]]]:
        """Optimizer steps whose micro-batches are all rows once."""
        return self.steps[: len(self.steps) // self.passes]

    @property
    def micro_batches(self) -> list[Sequence[int]]:
        """All rows once, in the micro-batches of the first pass."""
        return [rows for step in self.first_pass for rows in step]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a stage's examples become optimizer steps."""

    sampler: Sampler
    """Of examples, or of the prompts of a rollout."""
    minibatches: int
    """Optimizer steps of one pass over a step batch."""
    epochs: int
    """Passes over it."""
    total_steps: int

    @classmethod
    def of(cls, stage: Stage, examples: int) -> Schedule:
        """For a stage with so many examples (on-policy: prompts) of training data."""
        train, rollout = stage.train, stage.rollout
        responses = (rollout.responses if rollout else None) or train.batch_size
        per_prompt, epochs = (rollout.samples_per_prompt, rollout.epochs) if rollout else (1, 1)
        sampler, minibatches = Sampler(examples, responses // per_prompt, train.seed), responses // train.batch_size
        steps = train.max_steps or sampler.steps_for(train.epochs) * minibatches * epochs
        return cls(sampler, minibatches, epochs, steps)

    @property
    def steps_of_a_batch(self) -> int:
        return self.minibatches * self.epochs

    def epoch(self, step: int) -> float:
        """Epochs of the training data that so many optimizer steps have read."""
        return self.sampler.epoch(step) / self.steps_of_a_batch


class DataBatches:
    """Step batches that are read from the data."""

    def __init__(self, stage: Stage, data: StageData, schedule: Schedule, processes: Processes) -> None:
        """Raises UserError when the objective compares rows with other prompts, and a step has one prompt only."""
        self._examples, self._pad = data.train, data.tokenizer.pad_token_id
        self._schedule, self._processes = schedule, processes
        self._micro, self._mismatches = micro_batches_of(stage.train), stage.objective.prepares is Prepares.MISMATCHED
        self.total_steps, self.epoch = schedule.total_steps, schedule.epoch
        for step in range(self.total_steps if self._mismatches else 0):
            if mismatched(self._rows(step)) is None:
                raise UserError(
                    f"train.batch_size: all {schedule.sampler.batch_size} examples of step {step + 1} have the same "
                    "prompt, so that none can be compared with another's response; raise it, or give more prompts"
                )

    def at(self, step: int) -> StepBatch:
        """The batch of a step: the same whenever it is asked for."""
        examples = [self._examples.rows(i) for i in self._schedule.sampler.batch(step)]
        mine = self._share(examples)
        batch = collate([row for part in mine for i in part for row in examples[i]], self._examples.kind, self._pad)
        starts = accumulate((len(part) for part in mine), initial=0)
        cut = [batch.rows_of(range(start, start + len(part))) for start, part in zip(starts, mine, strict=False)]
        others = [[row] for row in mismatched([row for rows in examples for row in rows]) or []]
        return StepBatch(
            batch,
            len(examples),
            [cut],
            mismatched=[
                collate([row for i in part for row in others[i]], self._examples.kind, self._pad)
                for part in (self._share(others) if self._mismatches else ())
            ],
        )

    def _share(self, examples: Sequence[Sequence[Row]]) -> list[list[int]]:
        """The examples of this process, in micro-batches: those of the whole step do not depend on who reads them."""
        world, rows = self._processes.world, len(examples[0])
        return self._micro.cut(_lengths(examples), rows, multiple=world)[self._processes.rank :: world]

    def _rows(self, step: int) -> list[Row]:
        return [row for i in self._schedule.sampler.batch(step) for row in self._examples.rows(i)]


def micro_batches_of(train: Train) -> MicroBatches:
    return MicroBatches(train.micro_batch_size, train.micro_batch_tokens)


def _lengths(examples: Iterable[Sequence[Row]]) -> list[int]:
    """Tokens of the longest row of each example."""
    return [max(len(row.prompt_ids) + len(row.response_ids) for row in rows) for rows in examples]


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


class RolloutBatches:
    """Step batches of responses that the live policy gives to the prompts of the data."""

    def __init__(
        self,
        stage: Stage,
        prompts: Examples,
        schedule: Schedule,
        processes: Processes,
        policy: LoadedModel,
        *,
        gold_reward: GoldReward | None = None,
        write: Callable[[int, list[dict[str, Any]]], None] = lambda step, rows: None,
    ) -> None:
        """`gold_reward` measures the gold reward where the data knows one; `write` is given a step and its samples."""
        assert stage.rollout is not None
        settings = stage.rollout
        self._examples, self._policy = prompts, policy
        self._schedule, self._processes = schedule, processes
        self._micro, self._seed, self._group = (
            micro_batches_of(stage.train),
            stage.train.seed,
            settings.samples_per_prompt,
        )
        self._params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p)
        self._gold_reward, self._write = gold_reward, write
        self._compares = True  # generation with training: once, since what generates is the policy itself
        self.total_steps, self.epoch = schedule.total_steps, schedule.epoch

    def at(self, step: int) -> StepBatch:
        """The rollout whose first optimizer step comes after `step` of them, drawn from the policy as it is now."""
        number = step // self._schedule.steps_of_a_batch
        requests = self._requests(number)
        # This process's part of each optimizer step, so that the samples of a step do not depend on `world`.
        each = len(requests) // self._schedule.minibatches
        share = each // self._processes.world
        mine = [
            one
            for start in range(self._processes.rank * share, len(requests), each)
            for one in requests[start : start + share]
        ]
        prompts = [self._examples.prompt_ids(example) for _, example, _ in mine]
        seeds = [sample_seed(self._seed, number, self._examples.key(example), k) for _, example, k in mine]
        began = time.perf_counter()
        samples = self._policy.sample(prompts, replace(self._params, logps=self._compares), seeds)
        seconds = time.perf_counter() - began
        rows = [
            Row(prompt, sample.token_ids, group=group)
            for prompt, sample, (group, _, _) in zip(prompts, samples, mine, strict=True)
        ]
        batch = collate(rows, DataKind.RESPONSES, self._policy.tokenizer.pad_token_id)
        sampled_logp_BT = sampled_logps(batch, samples) if self._compares else None
        self._compares = False
        metrics = completion_metrics(samples)
        tokens, _ = metrics["completions/mean_length"]
        metrics["rollout/tokens_per_second"] = Metric(tokens, torch.tensor(seconds / self._processes.world))
        return StepBatch(
            batch,
            each,
            [self._cut(batch, rows_of_step) for rows_of_step in self._rows_of_steps(number, share)],
            metrics | self._scores(step, prompts, samples),
            passes=self._schedule.epochs,
            sampled_logp_BT=sampled_logp_BT,
        )

    def _cut(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """The rows of an optimizer step, in as many micro-batches on every process."""
        lengths = [batch.spans[row].end for row in rows]
        cut = self._micro.cut(lengths)
        if self._micro.tokens is not None:
            most = self._processes.max(torch.tensor(len(cut), device=self._processes.device))
            cut = self._micro.cut(lengths, least=int(most))
        return [[rows[place] for place in part] for part in cut]

    def _requests(self, number: int) -> list[tuple[int, int, int]]:
        """(number of the prompt, example, number of the sample) of a rollout, over all processes.

        A prompt that stands in a batch twice, where epochs meet or a source is repeated, gets different samples.
        """
        counts = Counter[str]()
        requests = []
        for prompt, example in enumerate(self._schedule.sampler.batch(number)):
            for _ in range(self._group):
                requests.append((prompt, example, counts[self._examples.key(example)]))
                counts[self._examples.key(example)] += 1
        return requests

    def _rows_of_steps(self, number: int, share: int) -> list[list[int]]:
        """The rows of each optimizer step on this process; later passes exchange rows between steps, by the seed.

        Each stays at its place within a step, and with it on its process, so that neither `world` nor the size of
        micro-batches changes what a step is taken on.
        """
        steps_of_a_pass, rank = self._schedule.minibatches, self._processes.rank
        places = range(rank * share, (rank + 1) * share)
        steps = []
        for k in range(self._schedule.epochs):
            orders = [np.arange(steps_of_a_pass) for _ in places]
            if k > 0:
                drawn = (np.random.default_rng([self._seed, number, k, place]) for place in places)
                orders = [one.permutation(steps_of_a_pass) for one in drawn]
            steps += [[int(order[m]) * share + i for i, order in enumerate(orders)] for m in range(steps_of_a_pass)]
        return steps

    def _scores(self, step: int, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> dict[str, Metric]:
        """Write the samples down; where the data knows a gold reward, measure it."""
        texts = self._policy.texts(samples)
        scores = None if self._gold_reward is None else self._gold_reward(texts)
        self._write(step + 1, sample_rows(self._policy.tokenizer, prompts, samples, texts, scores))
        if scores is None:
            return {}
        return {"gold_reward": Metric(torch.tensor(sum(scores)), torch.tensor(float(len(scores))))}


def eval_batches(
    examples: Examples,
    micro: MicroBatches,
    limit: int | None,
    pad_id: int,
    processes: Processes,
    *,
    mismatches: bool = False,
) -> list[tuple[Batch, bool]]:
    """This process's part of the eval data in micro-batches, and whether each counts.

    With `mismatches` the prompts have each other's responses; none are there when all prompts are the same.
    ZeRO-3 gathers weights in every forward pass, so all processes need the same number of batches: one that has run out
    repeats the first, which then does not count.
    """
    count = min(len(examples), limit or len(examples))
    each: list[Sequence[Row]] = [examples.rows(i) for i in range(count)]
    if mismatches:
        each = [[row] for row in mismatched([row for rows in each for row in rows]) or []]
    cut = micro.cut(_lengths(each), len(each[0])) if each else []
    turns = -(-len(cut) // processes.world)
    batches = []
    for number in range(processes.rank, turns * processes.world, processes.world):
        counts = number < len(cut)
        rows = [row for i in cut[number if counts else 0] for row in each[i]]
        batches.append((collate(rows, examples.kind, pad_id), counts))
    return batches
