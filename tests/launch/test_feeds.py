"""Which examples fall to which process, and which samples are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from toyland import build_model, build_tokenizer

from aligndistil.batch import DataKind
from aligndistil.data import Examples, Sampler, load_examples
from aligndistil.launch.feeds import DataFeed, RolloutFeed, Share, eval_batches
from aligndistil.recipe import Data
from aligndistil.rollout import SamplingParams, TransformersRollout


@pytest.fixture
def examples(pairs_file: Callable[..., str]) -> Callable[[DataKind], Examples]:
    section = Data.model_validate({"train": {"path": pairs_file(7)}})
    tokenizer = build_tokenizer()
    return lambda kind: load_examples(section, "train", kind, tokenizer, frozenset({1}), tokenizer.chat_template)


def test_processes_share_a_batch_without_overlap_or_gap(examples: Callable[[DataKind], Examples]) -> None:
    pairs = examples(DataKind.PAIRS)
    sampler = Sampler(len(pairs), 4, 0)
    for step in range(5):  # a batch of 4 of 7 pairs crosses epochs
        whole = DataFeed(pairs, sampler, Share(0, 1, 2), 0)(step)
        parts = [DataFeed(pairs, sampler, Share(rank, 2, 2), 0)(step) for rank in range(2)]
        assert [batch.ids_BT.tolist() for batch in whole.micro_batches] == [
            batch.ids_BT.tolist() for part in parts for batch in part.micro_batches
        ]
        assert {whole.examples, *(part.examples for part in parts)} == {4}
        assert all(batch.rows == 4 for batch in whole.micro_batches)


def rollout_feed(examples: Examples, rank: int, world: int, shown: list[Any], batch: int = 4) -> RolloutFeed:
    model = build_model(seed=0)
    return RolloutFeed(
        examples,
        Sampler(len(examples), batch // 2, 0),
        Share(rank, world, 2),
        build_tokenizer(),
        TransformersRollout(lambda: nullcontext(model), frozenset({1}), 0, 96, batch_size=2),
        SamplingParams(8),
        samples_per_prompt=2,
        seed=0,
        scorer=lambda texts: [float(len(text)) for text in texts],
        show=lambda step, rows: shown.append((step, rows)),
    )


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(
    examples: Callable[[DataKind], Examples],
) -> None:
    prompts = examples(DataKind.PROMPTS)
    shown: list[Any] = []
    whole = rollout_feed(prompts, 0, 1, shown)(3)
    parts = [rollout_feed(prompts, rank, 2, [])(3) for rank in range(2)]
    assert [batch.ids_BT.tolist() for batch in whole.micro_batches] == [
        batch.ids_BT.tolist() for part in parts for batch in part.micro_batches
    ]
    assert whole.examples == 4
    assert {batch.kind for batch in whole.micro_batches} == {DataKind.RESPONSES}
    step, rows = shown[0]
    assert step == 4  # the step that these samples make
    assert [set(row) for row in rows] == [{"prompt", "response", "finished", "token_ids", "gold_reward"}] * 4
    lengths = [len(row["token_ids"]) for row in rows]
    total, count = whole.metrics["completions/mean_length"]
    assert float(total / count) == sum(lengths) / 4
    total, count = whole.metrics["completions/truncated_fraction"]
    assert float(total / count) == sum(not row["finished"] for row in rows) / 4
    total, count = whole.metrics["gold_reward"]
    assert float(total / count) == pytest.approx(sum(row["gold_reward"] for row in rows) / 4)


def test_the_samples_of_a_prompt_differ_also_when_it_comes_twice_in_a_step(
    examples: Callable[[DataKind], Examples],
) -> None:
    prompts = examples(DataKind.PROMPTS)
    shown: list[Any] = []
    rollout_feed(prompts, 0, 1, shown, batch=28)(0)  # 14 prompts of 7: every one twice, each with two samples
    drawn: dict[str, set[tuple[int, ...]]] = {}
    for row in shown[0][1]:
        drawn.setdefault(row["prompt"], set()).add(tuple(row["token_ids"]))
    assert len(drawn) == 7
    assert all(len(samples) >= 3 for samples in drawn.values())  # short ones may be equal by chance


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 5, 1])
def test_every_process_has_as_many_eval_batches_and_each_example_counts_once(
    world: int, limit: int | None, examples: Callable[[DataKind], Examples]
) -> None:
    pairs = examples(DataKind.PAIRS)
    shares = [eval_batches(pairs, Share(rank, world, 2), limit, 0) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = sum(batch.examples for share in shares for batch, counts in share if counts)
    assert counted == (limit or 7)


def test_sampling_draws_nothing_from_the_generator_of_the_run(examples: Callable[[DataKind], Examples]) -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    rollout_feed(examples(DataKind.PROMPTS), 0, 1, [])(0)
    assert random.random() == expected
