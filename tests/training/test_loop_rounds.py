"""Rounds of the loop: what an objective finds out before the first gradient, and several optimizer steps after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from aligndistil.errors import DivergedError, Interrupted
from aligndistil.maths import Metric
from aligndistil.objectives.base import Expected
from aligndistil.training.batches import StepBatch
from aligndistil.training.checkpoints import LoopState
from aligndistil.training.evaluation import evaluate
from support.loop import (
    Alone,
    PreparesMismatched,
    PreparesRollout,
    Recorded,
    ToyEngine,
    batch,
    run,
    step_batch,
    without_perf,
)

TWO_STEPS = [[0, 1], [2, 3]]
THREE_STEPS = [[0], [1], [2]]


@pytest.fixture(autouse=True)
def nothing_given_yet() -> None:
    PreparesRollout.given.clear()


def of_rounds(updates: list[list[int]], examples: int = 2) -> Callable[[int], StepBatch]:
    """A rollout of one micro-batch for each that is named, up to four; the first depends on the step it starts at."""
    made = Metric(torch.tensor(12.0), torch.tensor(4.0))

    def data(step: int) -> StepBatch:
        batches = [batch(step + 1, 7), batch(2, 2, 4), batch(9), batch(5)]
        return step_batch(
            batches[: len({number for step in updates for number in step})],
            examples,
            {"made": made},
            steps=updates,
            passes=len(updates) // len({tuple(sorted(step)) for step in updates}),
        )

    return data


def prepared_run(
    updates: list[list[int]], recorded: Recorded | None = None, **settings: Any
) -> tuple[ToyEngine, dict[str, float]]:
    engine = settings.pop("engine", None) or ToyEngine(objective=PreparesRollout())
    state = run(recorded or Recorded(), engine, **{"data": of_rounds(updates), **settings})
    return engine, state.last


def test_every_loss_of_a_round_is_given_the_means_over_all_of_it_and_the_terms_of_its_own_rows() -> None:
    engine, _ = prepared_run(TWO_STEPS, total_steps=4)
    first, second = (1 + 7 + 2 + 2 + 4 + 9 + 5) / 7, (3 + 7 + 2 + 2 + 4 + 9 + 5) / 7
    means = [float(given["seen/first"]) for given in engine.prepared]
    assert means == pytest.approx([first] * 4 + [second] * 4)
    firsts = [given["first"].amax(-1).tolist() for given in engine.prepared]
    assert firsts == [[1, 7], [2, 2, 4], [9], [5], [3, 7], [2, 2, 4], [9], [5]]


def test_means_are_given_so_precisely_that_a_small_variance_can_be_told_from_them() -> None:
    engine, _ = prepared_run([[0, 1, 2]], total_steps=1)
    assert engine.prepared[0]["seen/first"].dtype == torch.float64


def test_a_round_is_made_once_for_all_of_its_steps() -> None:
    asked: list[int] = []
    rounds = of_rounds(TWO_STEPS)
    engine, _ = prepared_run(TWO_STEPS, total_steps=6, data=lambda step: asked.append(step) or rounds(step))
    assert asked == [0, 2, 4]
    assert engine.steps == 6
    assert engine.micro_steps[:4] == [(2, 2, False), (3, 2, True), (1, 2, False), (1, 2, True)]
    assert len(PreparesRollout.given) == 3


def test_what_a_round_measured_is_logged_with_its_first_step_alone() -> None:
    recorded = Recorded()
    prepared_run(TWO_STEPS, recorded, total_steps=4)
    for name in ("seen/first", "made"):
        assert recorded.steps_with(name) == [1, 3], name
    assert recorded.steps_with("loss/given") == [1, 2, 3, 4]
    together = Recorded()
    _, last = prepared_run(TWO_STEPS, together, total_steps=4, log_every=4)
    assert together.steps_with("seen/first") == [4]
    assert last["seen/first"] == pytest.approx((30 + 32) / 14)
    assert last["made"] == 3.0


def test_evaluations_and_checkpoints_that_fall_due_inside_a_round_wait_for_its_end() -> None:
    recorded = Recorded()
    prepared_run(THREE_STEPS, recorded, total_steps=12, evaluate_every=2, checkpoint_every=5)
    assert recorded.evaluated == [0, 3, 6, 9, 12]
    assert [step for step, _ in recorded.split("eval")] == [0, 3, 6, 9, 12]
    assert [state.step for state in recorded.saved] == [6]  # 5 was due; 10 is, at the end, which is exported instead
    rarely = Recorded()
    prepared_run(THREE_STEPS, rarely, total_steps=9, evaluate_every=6)
    assert rarely.evaluated == [0, 6, 9]


def test_the_last_round_stops_where_the_steps_end() -> None:
    recorded = Recorded()
    engine, last = prepared_run(THREE_STEPS, recorded, total_steps=5)
    assert engine.steps == 5
    assert [rows for rows, _, _ in engine.micro_steps] == [2, 3, 1, 2, 3]
    assert [step for step, _ in recorded.split("train")] == [1, 2, 3, 4, 5]
    assert recorded.evaluated == [5]
    assert last["epoch"] == 2.5


def test_an_objective_is_given_the_state_that_the_round_before_left() -> None:
    prepared_run(TWO_STEPS, total_steps=6)
    second = 0.5 + 2 * 2 * 30 / 7  # two steps of two examples
    third = second + 2 * 2 * 32 / 7
    assert [given["carried"] for given in PreparesRollout.given] == pytest.approx([0.5, second, third])


def test_examples_that_several_steps_see_are_counted_once() -> None:
    twice = [[0, 1, 2], [2, 0, 1]]
    prepared_run(twice, total_steps=4, data=of_rounds(twice, examples=6))
    assert PreparesRollout.given[-1]["carried"] == pytest.approx(0.5 + 6 * 25 / 6)
    PreparesRollout.given.clear()
    prepared_run([[0], [1], [2]] * 2, total_steps=12)
    assert PreparesRollout.given[-1]["carried"] == pytest.approx(0.5 + 3 * 2 * 25 / 6)


def test_a_stop_waits_for_the_end_of_the_round_and_the_run_goes_on_with_its_state() -> None:
    settings: dict[str, Any] = {"log_every": 4, "total_steps": 9}
    whole, first, second = Recorded(), Recorded(), Recorded()
    prepared_run(THREE_STEPS, whole, **settings)
    state = LoopState(objective=PreparesRollout().initial_state())
    with pytest.raises(Interrupted, match="stopped after step 3"):
        run(
            first,
            ToyEngine(objective=PreparesRollout()),
            state,
            data=of_rounds(THREE_STEPS),
            stop_requested=lambda: state.step == 1,
            **settings,
        )
    (saved,) = first.saved
    assert saved.objective == {"carried": pytest.approx(0.5 + 6 * 25 / 6)}
    restored = LoopState(**json.loads(json.dumps(asdict(saved))))
    engine = ToyEngine(objective=PreparesRollout(), steps=3)
    run(second, engine, restored, data=of_rounds(THREE_STEPS), **settings)
    assert without_perf(first.lines + second.lines) == without_perf(whole.lines)


def test_what_is_found_over_all_processes_is_what_the_losses_are_given() -> None:
    class Peer(Alone):
        """Another process, whose only metric of the preparation was 10 in total over 2 rows."""

        def sum(self, values: Tensor) -> Tensor:
            return values + torch.tensor([10.0, 2.0]) if len(values) == 2 else values

    engine, last = prepared_run(
        [[0, 1, 2]], total_steps=1, engine=ToyEngine(objective=PreparesRollout(), processes=Peer())
    )
    assert float(engine.prepared[0]["seen/first"]) == pytest.approx((25 + 10) / (6 + 2))
    assert last["seen/first"] == pytest.approx((25 + 10) / (6 + 2))


def test_the_first_step_is_compared_with_what_was_found_before_it() -> None:
    right, wrong = [Expected("seen/first", 30 / 7, 0.01, "so")], [Expected("seen/first", 0.0, 0.01, "it is not")]
    prepared_run(TWO_STEPS, expected=right)  # the second step of the round does not have the metric
    with pytest.raises(DivergedError, match=r"the first step has seen/first = 4.2857 and should have 0.0000"):
        prepared_run(TWO_STEPS, expected=wrong)


def test_on_mismatched_rows_only_means_are_found() -> None:
    engine, recorded = ToyEngine(objective=PreparesMismatched()), Recorded()
    data = step_batch([batch(1, 5), batch(8)], 3, mismatched=[batch(30, 40), batch(50)])
    last = run(recorded, engine, total_steps=2, data=lambda step: data).last
    assert [set(given) for given in engine.prepared] == [{"seen/first"}] * 4
    assert {float(given["seen/first"]) for given in engine.prepared} == {40.0}
    assert last["loss"] == pytest.approx(1.4 / 3)
    assert recorded.steps_with("seen/first") == [1, 2]  # a round is one step
    assert PreparesRollout.given[-1]["carried"] == pytest.approx(0.5 + 3 * 40)


def test_an_evaluation_finds_its_means_over_all_mismatched_rows_that_count() -> None:
    engine = ToyEngine(objective=PreparesMismatched())
    aside = [(batch(10), True), (batch(20, 60), True), (batch(999), False)]
    found = evaluate(engine, [(batch(1, 2), True), (batch(6), True)], aside)
    assert found["seen/first"] == pytest.approx(30.0)
    assert found["loss/given"] == pytest.approx(30.0)
    assert found["loss"] == pytest.approx(0.3)
