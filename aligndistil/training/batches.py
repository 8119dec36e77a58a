"""Where a step's micro-batches come from: the data, or samples of the policy that is being trained."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from aligndistil.recipe import Stage
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from aligndistil.training.data import GoldReward, StageData
from aligndistil.training.samples import completion_metrics, sample_rows, sampled_logps


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A global batch with one optimizer step, or a rollout with several, as one process sees it."""

    micro_batches: Sequence[Batch]
    examples: int
    """Examples of one optimizer step over all processes: what its loss is averaged over."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """What making the batch measured (a rollout's lengths, say)."""
    mismatched: Sequence[Batch] = ()
    """For an objective that prepares on mismatched rows."""
    minibatches: Sequence[Sequence[int]] = ()
    """The micro-batches of each optimizer step."""
    sampled_logp: Sequence[Tensor] = ()
    """Of each micro-batch (B, T), the log-probabilities of generation, where training's are compared with them."""
    together: int = 1
    """Neighbouring micro-batches that hold whole groups."""

    @property
    def all_examples(self) -> int:
        """Different examples over all processes, however many optimizer steps see each."""
        return self.examples * len(self.micro_batches) // len(self.minibatches[0])

    @property
    def whole_groups(self) -> list[Sequence[Batch]]:
        """The micro-batches, those together that share a group of samples."""
        return [self.micro_batches[i : i + self.together] for i in range(0, len(self.micro_batches), self.together)]


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
        self._size, self._mismatches = stage.train.micro_batch_size, stage.objective.prepares is Prepares.MISMATCHED
        self.total_steps, self.epoch = schedule.total_steps, schedule.epoch
        for step in range(self.total_steps if self._mismatches else 0):
            if mismatched(self._rows(step)) is None:
                raise UserError(
                    f"train.batch_size: all {schedule.sampler.batch_size} examples of step {step + 1} have the same "
                    "prompt, so that none can be compared with another's response; raise it, or give more prompts"
                )

    def at(self, step: int) -> StepBatch:
        """The batch of a step: the same whenever it is asked for."""
        rank, world = self._processes.rank, self._processes.world
        sampler, kind = self._schedule.sampler, self._examples.kind
        micro_batches = [
            collate([row for i in part for row in self._examples.rows(i)], kind, self._pad)
            for part in sampler.micro_batches(step, rank, world, self._size)
        ]
        others = mismatched(self._rows(step)) or [] if self._mismatches else []
        mine = others[rank * len(others) // world : (rank + 1) * len(others) // world]
        return StepBatch(
            micro_batches,
            sampler.batch_size,
            mismatched=[collate(mine[i : i + self._size], kind, self._pad) for i in range(0, len(mine), self._size)],
            minibatches=[range(len(micro_batches))],
        )

    def _rows(self, step: int) -> list[Row]:
        return [row for i in self._schedule.sampler.batch(step) for row in self._examples.rows(i)]


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
        self._size, self._seed, self._group = (
            stage.train.micro_batch_size,
            stage.train.seed,
            settings.samples_per_prompt,
        )
        self._together = math.lcm(self._size, self._group) // self._size if stage.objective.groups else 1
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
        micro_batches = [
            collate(rows[start : start + self._size], DataKind.RESPONSES, self._policy.tokenizer.pad_token_id)
            for start in range(0, len(rows), self._size)
        ]
        of_rows = [samples[start : start + self._size] for start in range(0, len(rows), self._size)]
        compared = zip(micro_batches, of_rows, strict=True) if self._compares else ()
        self._compares = False
        metrics = completion_metrics(samples)
        tokens, _ = metrics["completions/mean_length"]
        metrics["rollout/tokens_per_second"] = Metric(tokens, torch.tensor(seconds / self._processes.world))
        return StepBatch(
            micro_batches,
            each,
            metrics | self._scores(step, prompts, samples),
            minibatches=self._minibatches(number, len(micro_batches)),
            sampled_logp=[sampled_logps(batch, some) for batch, some in compared],
            together=self._together,
        )

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

    def _minibatches(self, number: int, micro_batches: int) -> list[list[int]]:
        """Micro-batches of each optimizer step; later passes exchange them between steps, by the seed.

        Each stays at its place within a step, and with it on its process, so that `world` changes nothing here either.
        """
        steps_of_a_pass, rank = self._schedule.minibatches, self._processes.rank
        each = micro_batches // steps_of_a_pass
        minibatches = []
        for k in range(self._schedule.epochs):
            steps = [list(range(steps_of_a_pass)) for _ in range(each)]
            if k > 0:
                places = range(rank * each, (rank + 1) * each)
                orders = (np.random.default_rng([self._seed, number, k, place]) for place in places)
                steps = [order.permutation(steps_of_a_pass).tolist() for order in orders]
            minibatches += [[steps[i][m] * each + i for i in range(each)] for m in range(steps_of_a_pass)]
        return minibatches

    def _scores(self, step: int, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> dict[str, Metric]:
        """Write the samples down; where the data knows a gold reward, measure it."""
        texts = self._policy.texts(samples)
        scores = None if self._gold_reward is None else self._gold_reward(texts)
        self._write(step + 1, sample_rows(self._policy.tokenizer, prompts, samples, texts, scores))
        if scores is None:
            return {}
        return {"gold_reward": Metric(torch.tensor(sum(scores)), torch.tensor(float(len(scores))))}


def eval_batches(
    examples: Examples, size: int, limit: int | None, pad_id: int, processes: Processes, *, mismatches: bool = False
) -> list[tuple[Batch, bool]]:
    """This process's part of the eval data in batches of `size`, and whether each counts.

    With `mismatches` the prompts have each other's responses; none are there when all prompts are the same.
    ZeRO-3 gathers weights in every forward pass, so all processes need the same number of batches: one that has run out
    repeats the first, which then does not count.
    """
    count = min(len(examples), limit or len(examples))
    each = [examples.rows(i) for i in range(count)]
    if mismatches:
        each = [[row] for row in mismatched([row for rows in each for row in rows]) or []]
    starts = range(0, len(each), size)
    turns = -(-len(starts) // processes.world)
    batches = []
    for number in range(processes.rank, turns * processes.world, processes.world):
        counts = number < len(starts)
        start = starts[number] if counts else 0
        rows = [row for some in each[start : start + size] for row in some]
        batches.append((collate(rows, examples.kind, pad_id), counts))
    return batches
