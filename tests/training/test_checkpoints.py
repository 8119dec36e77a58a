"""When a stage saves what it has learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligndistil.recipe import Checkpoint
from aligndistil.training import checkpoints as module
from aligndistil.training.checkpoints import Checkpoints, LoopState


class Clock:
    """Seconds, which saving takes `cost` of."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost = 100.0, cost

    def save(self, *_: Any, **__: Any) -> None:
        self.now += self.cost


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checkpoints of a model of so many weights, of which each save takes so long, and the clock."""

    def build(settings: dict[str, Any], *, cost: float = 1.0, weights: int = 1000, world: int = 1) -> Any:
        clock = Clock(cost)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(module, "save_checkpoint", clock.save)
        network = torch.nn.Linear(weights, 1, bias=False, device="meta")
        engine: Any = SimpleNamespace(
            deepspeed={"policy": SimpleNamespace(module=network)}, processes=SimpleNamespace(world=world)
        )
        return Checkpoints(engine, Path(), Checkpoint.model_validate(settings)), clock

    return build


def seconds_until_overdue(checkpoints: Checkpoints, clock: Clock) -> int:
    begin = clock.now
    while not checkpoints.overdue():
        clock.now += 1
        if clock.now > begin + 5000:
            return -1
    return round(clock.now - begin)


@pytest.mark.parametrize(("cost", "expected"), [(1, 21), (5, 101), (0.25, 6), (29, 581), (31, 601), (400, 601)])
def test_work_is_saved_when_it_took_twenty_times_what_saving_takes_or_ten_minutes(
    after: Any, cost: float, expected: int
) -> None:
    checkpoints, clock = after({}, cost=cost)
    checkpoints.save(LoopState(step=1))
    for _ in range(2):
        assert seconds_until_overdue(checkpoints, clock) == expected
        checkpoints.save(LoopState(step=2))


@pytest.mark.parametrize(
    ("weights", "world", "expected"), [(1_000_000, 1, 4), (100_000_000, 1, 321), (100_000_000, 8, 41), (10**10, 1, 601)]
)
def test_before_the_first_one_its_cost_is_guessed_by_the_size(
    after: Any, weights: int, world: int, expected: int
) -> None:
    assert seconds_until_overdue(*after({}, weights=weights, world=world)) == expected


@pytest.mark.parametrize(
    ("every", "steps", "due"),
    [("auto", (3, 4), False), ("never", (3, 4), False), (4, (3, 4), True), (4, (4, 5), False), (4, (3, 9), True)],
)
def test_steps_count_where_the_recipe_says_so(after: Any, every: Any, steps: tuple[int, int], due: bool) -> None:
    checkpoints, clock = after({"every": every})
    assert checkpoints.due(*steps) is due
    assert (seconds_until_overdue(checkpoints, clock) > 0) is (every == "auto")
