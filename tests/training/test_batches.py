"""Which examples fall to which process, and which samples are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligndistil.batch import Batch, DataKind, Row
from aligndistil.data import Examples, Sampler, load_examples
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.objectives.base import Objective, OnPolicy, Prepares
from aligndistil.recipe import Data, Rollout, Train
from aligndistil.rollout import LoadedModel
from aligndistil.training.batches import (
    DataBatches,
    RolloutBatches,
    Schedule,
    StepBatch,
    eval_batches,
    mismatched,
)
from aligndistil.training.micro_batches import MicroBatches
from support.models import build_model, build_tokenizer


def shard(rank: int = 0, world: int = 1) -> Processes:
    return Processes(rank, world, torch.device("cpu"))


def stage_of(name: str, rollout: dict[str, Any] | None = None, **train: Any) -> Any:
    """As much of a stage as batches are made from."""
    sections = {"learning_rate": 1e-3, "micro_batch_size": 2, **train}
    return SimpleNamespace(
        objective=registry()[name].example(),
        train=Train.model_validate({key: value for key, value in sections.items() if value is not None}),
        rollout=None if rollout is None else Rollout.model_validate(rollout),
    )


def read(examples: Examples) -> Any:
    """As much of a stage's data."""
    return SimpleNamespace(train=examples, tokenizer=build_tokenizer())


def data_batches(
    examples: Any, rank: int = 0, world: int = 1, batch: int = 4, name: str = "dpo", steps: int = 5
) -> Any:
    stage = stage_of(name, batch_size=batch, max_steps=steps)
    return DataBatches(stage, read(examples), Schedule.of(stage, len(examples)), shard(rank, world))


@pytest.fixture
def examples(pairs_file: Callable[..., str]) -> Callable[[DataKind], Examples]:
    section = Data.model_validate({"train": {"path": pairs_file(7)}})
    tokenizer = build_tokenizer()
    return lambda kind: load_examples(section, "train", kind, tokenizer, frozenset({1}))


def test_processes_share_a_batch_without_overlap_or_gap(examples: Callable[[DataKind], Examples]) -> None:
    pairs = examples(DataKind.PAIRS)
    for step in range(5):  # a batch of 4 of 7 pairs crosses epochs
        whole = data_batches(pairs).at(step)
        parts = [data_batches(pairs, rank, 2).at(step) for rank in range(2)]
        first, second = (read_together(part) for part in parts)
        assert read_together(whole) == [micro_batch for both in zip(first, second, strict=True) for micro_batch in both]
        assert {whole.examples, *(part.examples for part in parts)} == {4}
        assert all(len(rows) == 4 for rows in whole.micro_batches)
        expected = [pairs.rows(i) for i in Sampler(7, 4, 0).batch(step)]
        found = [text for micro_batch in read_together(whole) for text in micro_batch]
        assert sorted(found) == sorted((*row.prompt_ids, *row.response_ids) for rows in expected for row in rows)
        lengths = [max(map(len, micro_batch)) for micro_batch in read_together(whole)]
        assert lengths == sorted(lengths, reverse=True)


def rollout_batches(
    examples: Examples,
    rank: int,
    world: int,
    shown: list[Any],
    batch: int = 4,
    minibatches: int = 1,
    passes: int = 1,
    name: str = "ppo",
    group: int = 2,
    micro: int = 2,
    tokens: int | None = None,
) -> RolloutBatches:
    model = build_model(seed=0)
    rollout = {"max_new_tokens": 8, "samples_per_prompt": group, "responses": batch, "epochs": passes}
    size = {"micro_batch_size": micro} if tokens is None else {"micro_batch_size": None, "micro_batch_tokens": tokens}
    stage = stage_of(name, rollout, batch_size=batch // minibatches, **size)
    return RolloutBatches(
        stage,
        examples,
        Schedule.of(stage, len(examples)),
        shard(rank, world),
        LoadedModel(model, build_tokenizer(), frozenset({1}), 96, batch_size=2),
        gold_reward=lambda texts: [float(len(text)) for text in texts],
        write=lambda step, rows: shown.append((step, rows)),
    )


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(
    examples: Callable[[DataKind], Examples],
) -> None:
    prompts = examples(DataKind.PROMPTS)
    shown: list[Any] = []
    whole = rollout_batches(prompts, 0, 1, shown).at(3)
    parts = [rollout_batches(prompts, rank, 2, []).at(3) for rank in range(2)]
    assert texts(whole.batch) == [text for part in parts for text in texts(part.batch)]
    assert whole.examples == 4
    assert whole.batch.kind is DataKind.RESPONSES
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
    rollout_batches(prompts, 0, 1, shown, batch=28).at(0)  # 14 prompts of 7: every one twice, each with two samples
    drawn: dict[str, set[tuple[int, ...]]] = {}
    for row in shown[0][1]:
        drawn.setdefault(row["prompt"], set()).add(tuple(row["token_ids"]))
    assert len(drawn) == 7
    assert all(len(samples) >= 3 for samples in drawn.values())  # short ones may be equal by chance


def read_together(made: StepBatch) -> list[list[tuple[int, ...]]]:
    """The tokens of each row of each micro-batch."""
    return [texts(made.batch.take(rows)) for rows in made.micro_batches]


def rows_of_steps(made: StepBatch) -> list[list[int]]:
    """The rows of each optimizer step, in their own order."""
    return [sorted(row for rows in step for row in rows) for step in made.steps]


def texts(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of each row, however wide the batch is."""
    return [tuple(ids[real].tolist()) for ids, real in zip(batch.ids_BT, batch.attention_BT, strict=True)]


def test_a_rollout_for_several_steps_gives_each_its_part_and_every_pass_all_of_it(
    examples: Callable[[DataKind], Examples],
) -> None:
    batches = rollout_batches(examples(DataKind.PROMPTS), 0, 1, [], batch=12, minibatches=3, passes=4)
    made = batches.at(0)
    assert (len(made.steps), made.examples, made.all_examples, len(made.micro_batches)) == (12, 4, 12, 6)
    passes = [rows_of_steps(made)[start : start + 3] for start in range(0, 12, 3)]
    assert passes[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for steps in passes:
        assert sorted(row for step in steps for row in step) == list(range(12))
    assert len({tuple(sorted(map(tuple, steps))) for steps in passes}) > 1, "nothing was exchanged"
    assert batches.at(0).steps == made.steps
    exchanged = rows_of_steps(batches.at(12))[3:]
    assert exchanged != rows_of_steps(made)[3:], "the next rollout is exchanged otherwise"
    by_tokens = rollout_batches(examples(DataKind.PROMPTS), 0, 1, [], batch=12, minibatches=3, passes=4, tokens=40)
    assert rows_of_steps(by_tokens.at(0)) == rows_of_steps(made), "micro-batches change what a step is taken on"


def test_the_steps_of_a_rollout_have_the_same_samples_whatever_the_number_of_processes(
    examples: Callable[[DataKind], Examples],
) -> None:
    prompts, several = examples(DataKind.PROMPTS), {"batch": 12, "minibatches": 3, "passes": 3}

    def steps(rank: int, world: int) -> list[list[tuple[int, ...]]]:
        made = rollout_batches(prompts, rank, world, [], **several).at(9)
        return [[texts(made.batch)[row] for row in step] for step in rows_of_steps(made)]

    whole, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert len(whole) == 9
    for all_of_it, one, other in zip(whole, first, second, strict=True):
        assert len(one) == len(other) == 2
        assert sorted(all_of_it) == sorted(one + other)
    assert whole[0] == first[0] + second[0]


def test_a_rollout_is_drawn_by_its_number_and_shown_once(examples: Callable[[DataKind], Examples]) -> None:
    """Ten steps on, the second rollout of a feed of two steps each is the sixth of one that takes one."""
    prompts, shown = examples(DataKind.PROMPTS), []
    several = rollout_batches(prompts, 0, 1, shown, batch=8, minibatches=2)
    single = rollout_batches(prompts, 0, 1, [], batch=8)
    ours, theirs = several.at(10), single.at(5)
    assert texts(ours.batch) == texts(theirs.batch)
    assert [step for step, _ in shown] == [11]


def row(prompt: int, response: int, label: bool = True) -> Row:
    return Row([prompt, 9], [response, 1], label)


@pytest.mark.parametrize("count", range(2, 10))
def test_each_prompt_meets_the_response_of_the_next_row(count: int) -> None:
    rows = [row(i, 50 + i, i % 3 == 0) for i in range(count)]
    others = mismatched(rows)
    assert others is not None
    assert [other.prompt_ids for other in others] == [[i, 9] for i in range(count)]
    assert [other.response_ids for other in others] == [[50 + (i + 1) % count, 1] for i in range(count)]
    assert [other.label for other in others] == [one.label for one in rows]


def test_a_row_with_the_same_prompt_is_passed_over_since_its_response_would_fit() -> None:
    rows = [row(1, 51), row(1, 52), row(2, 53), row(2, 54), row(1, 55)]
    others = mismatched(rows)
    assert others is not None
    assert [other.response_ids[0] for other in others] == [53, 53, 55, 55, 53]
    assert mismatched([row(1, 51), row(1, 52)]) is None
    assert mismatched([row(1, 51)]) is None


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_has_the_mismatched_rows_of_its_own_batch_in_equal_parts(
    world: int, examples: Callable[[DataKind], Examples]
) -> None:
    unpaired = examples(DataKind.UNPAIRED)
    sampler = Sampler(len(unpaired), 8, 0)
    rows = [unpaired.rows(i)[0] for i in sampler.batch(3)]
    expected = mismatched(rows)
    assert expected is not None
    parts = [data_batches(unpaired, rank, world, 8, "kto").at(3) for rank in range(world)]
    found = [text for part in parts for batch in part.mismatched for text in texts(batch)]
    assert sorted(found) == sorted((*other.prompt_ids, *other.response_ids) for other in expected)
    assert {len(part.mismatched) for part in parts} == {4 // world}
    assert {text for part in parts for text in texts(part.batch)}.isdisjoint(found)
    assert data_batches(unpaired, batch=8).at(3).mismatched == []


def test_a_step_whose_prompts_are_all_the_same_is_noticed_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        kind = DataKind.UNPAIRED

        def rows(self, index: int) -> list[Row]:
            return [row(1 if index < 4 else index, 50 + index)]

        def __len__(self) -> int:
            return 8

    monkeypatch.setattr(
        Sampler, "batch", lambda self, step: [step * self.batch_size + i for i in range(self.batch_size)]
    )
    sentence = "train.batch_size: all 2 examples of step 1 have the same prompt, so that none can be compared"
    with pytest.raises(UserError, match=sentence):
        data_batches(Same(), batch=2, name="kto", steps=4)
    data_batches(Same(), batch=4, name="sft", steps=2)
    with pytest.raises(UserError, match="all 4 examples of step 1"):
        data_batches(Same(), batch=4, name="kto", steps=2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mismatched_eval_rows_are_rotated_over_all_of_them_and_counted_once(
    world: int, examples: Callable[[DataKind], Examples]
) -> None:
    unpaired = examples(DataKind.UNPAIRED)
    shares = [
        eval_batches(unpaired, MicroBatches(2), 5, 0, shard(rank, world), mismatches=True) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    found = [text for share in shares for batch, counts in share if counts for text in texts(batch)]
    expected = mismatched([unpaired.rows(i)[0] for i in range(5)])
    assert expected is not None
    assert sorted(found) == sorted((*other.prompt_ids, *other.response_ids) for other in expected)
    assert eval_batches(unpaired, MicroBatches(2), 1, 0, shard(), mismatches=True) == []


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 5, 1])
def test_every_process_has_as_many_eval_batches_and_each_example_counts_once(
    world: int, limit: int | None, examples: Callable[[DataKind], Examples]
) -> None:
    pairs = examples(DataKind.PAIRS)
    shares = [eval_batches(pairs, MicroBatches(2), limit, 0, shard(rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = sum(batch.examples for share in shares for batch, counts in share if counts)
    assert counted == (limit or 7)


def test_sampling_draws_nothing_from_the_generator_of_the_run(examples: Callable[[DataKind], Examples]) -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    rollout_batches(examples(DataKind.PROMPTS), 0, 1, []).at(0)
    assert random.random() == expected


def test_a_process_of_short_samples_takes_as_many_micro_batches_as_the_others(
    examples: Callable[[DataKind], Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 the others would wait for it."""
    several = {"batch": 12, "minibatches": 3, "passes": 2, "tokens": 1000}
    prompts = examples(DataKind.PROMPTS)
    alone = rollout_batches(prompts, 0, 1, [], **several).at(0)
    assert [len(step) for step in alone.steps] == [1] * 6
    monkeypatch.setattr(Processes, "max", lambda self, values: values.clamp(min=3))
    beside = rollout_batches(prompts, 0, 1, [], **several).at(0)
    assert [len(step) for step in beside.steps] == [3] * 6
    assert rows_of_steps(beside) == rows_of_steps(alone)


class Compares(Objective):
    """Looks at the samples of one prompt together."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    prepares = Prepares.ROLLOUT
    groups = True
    name: str = "compares"


@pytest.mark.parametrize(("micro", "group"), [(2, 4), (12, 4), (2, 3), (1, 3)])
def test_samples_of_a_prompt_say_so_whatever_micro_batches_they_are_in(
    micro: int, group: int, examples: Callable[[DataKind], Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "registry", lambda: {"compares": Compares})
    made = rollout_batches(
        examples(DataKind.PROMPTS), 0, 1, [], batch=24, minibatches=2, name="compares", group=group, micro=micro
    ).at(0)
    assert made.batch.group_B is not None
    groups = made.batch.group_B.tolist()
    assert {groups.count(number) for number in groups} == {group}
    assert set(groups) == set(range(24 // group))
    assert {len(rows) for rows in made.micro_batches} == {micro}
