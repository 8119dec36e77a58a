"""`train.micro_batch_tokens`: the same training in micro-batches of another size, on one process and on two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.recipes import actor_critic, off_policy, unpaired
from support.run_folders import lines

ModelFolder = Callable[..., str]
CASES = ["dpo", "kto", "ppo"]


@pytest.fixture
def recipe_of(
    model_folder: ModelFolder, pairs_file: Callable[..., str], recipe_file: Callable[[dict[str, Any]], Path]
) -> Callable[..., Path]:
    """A stage of four steps: two of PPO's are later passes over its first rollout."""

    def write(name: str, **train: Any) -> Path:
        model, data = model_folder(seed=0), pairs_file(10)
        if name == "ppo":
            reward, critic = model_folder(seed=3, scalar=True), model_folder(seed=4, scalar=True)
            content = actor_critic(model, reward, critic, data)
        else:
            content = (off_policy if name == "dpo" else unpaired)(model, data)
        size = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 4, **train}
        changed = {"train": size, "evaluation": {"samples": 0, "every": None, "batch_size": 3}, "logging": {"every": 1}}
        if "rollout" in content:
            content["rollout"]["batch_size"] = 2
        return recipe_file({**content, **changed})

    return write


def losses(recipe: Path, name: str) -> list[float]:
    return [line["loss"] for line in lines(recipe.parent / "runs/toy" / name) if line["split"] == "train"]


@pytest.mark.parametrize("name", CASES)
def test_a_number_of_tokens_trains_what_a_number_of_examples_does(
    name: str, recipe_of: Callable[..., Path], command_line: Callable[..., Any]
) -> None:
    assert command_line("train", recipe_of(name, micro_batch_size=1))[0] == 0
    one = losses(recipe_of(name), name)
    recipe = recipe_of(name, micro_batch_tokens=40)
    code, _, err = command_line("train", recipe, "--fresh")
    assert code == 0, err
    assert losses(recipe, name) == pytest.approx(one, rel=1e-4)
    (first, *_) = (recipe.parent / "runs/toy" / name / "metrics.jsonl").read_text().splitlines()
    assert 0.5 < json.loads(first)["perf/real_token_fraction"] <= 1


@pytest.mark.parametrize("name", [pytest.param("dpo", marks=pytest.mark.slow), "ppo"])
def test_two_processes_take_as_many_micro_batches_each(
    name: str, recipe_of: Callable[..., Path], command_line: Callable[..., Any]
) -> None:
    """At ZeRO-3 they would wait for each other forever."""
    recipe = recipe_of(name, micro_batch_tokens=40)
    zero = ("--set", "engine.zero_stage=3")
    assert command_line("train", recipe, *zero)[0] == 0
    one = losses(recipe, name)
    code, _, err = command_line("train", recipe, *zero, "--fresh", "--processes", "2")
    assert code == 0, err
    assert losses(recipe, name) == pytest.approx(one, rel=1e-3)
