"""What the models of a comparison are asked, and the hash of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.evaluation import Bench, bench_of, plan_of
from aligndistil.recipe import load_recipe
from support.recipes import three_stages


@pytest.fixture
def bench(recipe_file: Callable[..., Path], model_folder: Callable[..., str], pairs_file: Callable[..., str]) -> Any:
    """The bench of three stages, with overrides."""
    path = recipe_file(three_stages(model_folder(seed=0), pairs_file(10)))

    def make(*overrides: str) -> Bench:
        recipe = load_recipe(path, ["report.reward_accuracy=true", *overrides])
        plan = plan_of(recipe)
        assert plan is not None
        return bench_of(recipe, plan, lambda name: name)

    return make


def test_training_pairs_are_as_many_as_the_held_out_ones(bench: Any) -> None:
    pairs = bench("report.pairs=3").pairs
    assert {split: len(given) for split, given in pairs.items()} == {"eval": 3, "train": 3}


@pytest.mark.parametrize(
    "override",
    ["report.pairs=3", "report.samples=3", "data.max_response_length=2", "stages.policy.data.max_response_length=2"],
)
def test_the_hash_follows_what_is_asked(bench: Any, override: str) -> None:
    assert bench(override).content_hash() != bench().content_hash()


@pytest.mark.parametrize(
    "override", ["stages.dpo.train.learning_rate=0.5", "stages.dpo.data.reverse_preferences=true", "train.seed=3"]
)
def test_and_not_how_the_models_were_trained(bench: Any, override: str) -> None:
    assert bench(override).content_hash() == bench().content_hash()
