"""The loop, with an engine of one number: what it logs, when it evaluates and saves, and when it refuses to go on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aligndistil.errors import EXIT_DIVERGED, EXIT_SIGTERM, DivergedError, Interrupted
from aligndistil.maths import Metric
from aligndistil.objectives.base import Expected
from aligndistil.training.checkpoints import LoopState
from aligndistil.training.evaluation import evaluate
from support.loop import PERF, Alone, Recorded, ToyEngine, batch, run, step_batch, without_perf


def test_a_line_a_step_holds_what_the_documentation_names() -> None:
    recorded = Recorded()
    last = run(recorded).last
    assert [step for step, _ in recorded.split("train")] == [1, 2, 3, 4]
    _, metrics = recorded.split("train")[1]
    own = {"loss", "lengths", "top", "grad_norm", "learning_rate", "epoch", "num_tokens"}
    assert set(metrics) == own | PERF
    # Step 2 has rows that begin with 2, 5 and 8, and 1, 2 and 1 response tokens.
    assert metrics["loss"] == pytest.approx((0.2 + 0.5 + 0.8) / 3)
    assert metrics["lengths"] == pytest.approx(4 / 3)
    assert metrics["top"] == pytest.approx(0.8)
    assert metrics["learning_rate"] == pytest.approx(0.2)
    assert metrics["epoch"] == 1.0
    # Two prompt tokens a row and the responses: (3 + 4) + 3 tokens a step.
    assert metrics["num_tokens"] == 2 * 10
    assert metrics["perf/peak_memory_gib"] > 0
    assert last["eval/loss"] == 0.5
    assert last["num_tokens"] == 40


def test_every_micro_batch_counts_in_the_whole_and_the_last_one_is_said_to_be_last() -> None:
    engine = ToyEngine()
    run(Recorded(), engine, total_steps=1)
    assert engine.micro_steps == [(2, 3, False), (1, 3, True)]


def test_a_line_every_few_steps_averages_over_them_and_takes_their_maximum() -> None:
    recorded = Recorded()
    tops = [9, 1, 2, 3, 4]
    run(recorded, log_every=3, total_steps=5, data=lambda step: step_batch([batch(tops[step])], 1))
    (first, one), (second, two) = recorded.split("train")
    assert (first, second) == (3, 5)
    assert one["loss"] == pytest.approx((0.9 + 0.1 + 0.2) / 3)
    assert two["loss"] == pytest.approx((0.3 + 0.4) / 2)
    assert one["top"] == pytest.approx(0.9)
    assert two["top"] == pytest.approx(0.4)


def test_evaluations_come_before_the_first_step_every_few_steps_and_at_the_end() -> None:
    recorded = Recorded()
    run(recorded, evaluate_every=3, total_steps=7)
    assert recorded.evaluated == [0, 3, 6, 7]
    assert [step for step, _ in recorded.split("eval")] == [0, 3, 6, 7]
    at_the_end = Recorded()
    run(at_the_end)
    assert at_the_end.evaluated == [4]


def test_nothing_evaluated_is_no_line() -> None:
    recorded = Recorded()
    run(recorded, evaluate=lambda step: {})
    assert recorded.split("eval") == []


def test_checkpoints_come_every_few_steps_and_not_at_the_end() -> None:
    recorded = Recorded()
    run(recorded, checkpoint_every=2)
    assert [state.step for state in recorded.saved] == [2]


@pytest.mark.parametrize(("asked", "saved"), [(1, [1]), (3, [3]), (4, [])])
def test_what_is_overdue_is_saved_after_its_step_and_not_at_the_end(asked: int, saved: list[int]) -> None:
    recorded = Recorded()
    run(recorded, overdue_at=asked)
    assert [state.step for state in recorded.saved] == saved


def test_a_run_goes_on_from_a_state_as_if_it_had_never_stopped() -> None:
    whole, first, second = Recorded(), Recorded(), Recorded()
    run(whole, log_every=3, total_steps=6)
    state = LoopState()
    with pytest.raises(Interrupted, match=r"stage toy: stopped after step 4; a checkpoint is saved"):
        run(first, start=state, log_every=3, total_steps=6, stop_requested=lambda: state.step == 3)
    (saved,) = first.saved
    engine = ToyEngine(steps=4)
    run(second, engine, saved, log_every=3, total_steps=6)
    assert without_perf(first.lines + second.lines) == without_perf(whole.lines)


def test_a_stop_during_the_last_step_ends_the_stage_as_usual() -> None:
    recorded = Recorded()
    run(recorded, stop_requested=lambda: True, total_steps=1)
    assert [state.step for state in recorded.saved] == [1]
    assert recorded.evaluated == [1]


def test_a_stop_of_one_process_stops_all() -> None:
    class Peer(Alone):
        def max(self, values: Tensor) -> Tensor:
            return torch.ones_like(values)

    with pytest.raises(Interrupted) as caught:
        run(Recorded(), ToyEngine(processes=Peer()))
    assert caught.value.exit_code == EXIT_SIGTERM


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step_is_taken(value: float) -> None:
    recorded, engine = Recorded(), ToyEngine(losses={2: value})
    with pytest.raises(DivergedError, match=rf"stage toy: the loss is {value} at step 3; .*lower train.learning_rate"):
        run(recorded, engine, checkpoint_every=1)
    assert engine.steps == 2
    assert [state.step for state in recorded.saved] == [1, 2]
    assert [step for step, _ in recorded.split("train")] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_too(value: float) -> None:
    recorded = Recorded()
    with pytest.raises(DivergedError, match=rf"the gradient norm is {value} at step 2") as caught:
        run(recorded, ToyEngine(norms=[1.0, value]), checkpoint_every=1)
    assert caught.value.exit_code == EXIT_DIVERGED
    assert [state.step for state in recorded.saved] == [1]


def test_a_critic_is_logged_and_its_gradient_watched_like_the_policy_s() -> None:
    recorded = Recorded()
    run(recorded, ToyEngine(critic={"critic/learning_rate": 0.25, "critic/grad_norm": 3.0}))
    _, metrics = recorded.split("train")[2]
    assert (metrics["critic/learning_rate"], metrics["critic/grad_norm"], metrics["grad_norm"]) == (0.25, 3.0, 1.0)
    # A learning rate is no norm, whatever it is.
    run(Recorded(), ToyEngine(critic={"critic/learning_rate": math.inf}))
    with pytest.raises(DivergedError, match=r"the gradient norm is nan at step 1"):
        run(Recorded(), ToyEngine(critic={"critic/grad_norm": math.nan}))


def test_a_first_step_that_contradicts_the_objective_stops_with_the_likely_causes() -> None:
    rows = step_batch([batch(5)], 1)
    wrong = [Expected("loss", math.log(2), 0.02, "both are the same model")]
    sentence = (
        r"the first step has loss = 0.5000 and should have 0.6931, since both are the same model; "
        r"likely causes: .*dtype or chat template"
    )
    with pytest.raises(DivergedError, match=sentence):
        run(Recorded(), data=lambda step: rows, expected=wrong)
    right = [Expected("loss", 0.51, 0.02, "it is so")]
    run(Recorded(), data=lambda step: rows, expected=right)


def test_only_the_first_step_is_compared() -> None:
    wrong = [Expected("loss", 100.0, 0.02, "never")]
    run(Recorded(), start=LoopState(step=1), expected=wrong)


def test_what_making_a_batch_measured_is_logged_with_it() -> None:
    recorded = Recorded()
    made = {"completions/mean_length": Metric(torch.tensor(30.0), torch.tensor(4.0))}
    run(recorded, data=lambda step: step_batch([batch(1)], 1, made))
    assert recorded.split("train")[0][1]["completions/mean_length"] == 7.5


def test_an_evaluation_counts_examples_once_whatever_batch_they_are_in() -> None:
    together = evaluate(ToyEngine(), [(batch(1, 2, 6), True)])
    apart = evaluate(ToyEngine(), [(batch(1, 2), True), (batch(6), True), (batch(9, 9), False)])
    assert together["loss"] == pytest.approx(0.3)
    assert apart["loss"] == pytest.approx(0.3)
    assert apart["top"] == pytest.approx(0.6)
