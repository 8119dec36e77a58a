"""The prompts and pairs that the models of a comparison are measured on, and the hash of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.batch import Row
from aligndistil.evaluation.measurements import EvalSet, measurements_of, read_eval_set
from aligndistil.recipe import load_recipe
from support.models import build_tokenizer
from support.recipes import three_stages


@pytest.fixture
def eval_set(recipe_file: Callable[..., Path], model_folder: Callable[..., str], pairs_file: Callable[..., str]) -> Any:
    """The eval set of three stages, with overrides."""
    path = recipe_file(three_stages(model_folder(seed=0), pairs_file(10)))

    def make(*overrides: str) -> EvalSet:
        measurements = measurements_of(load_recipe(path, ["report.reward_accuracy=true", *overrides]))
        assert measurements is not None
        return read_eval_set(measurements, lambda name: name)

    return make


def test_training_pairs_are_as_many_as_the_held_out_ones(eval_set: Any) -> None:
    pairs = eval_set("report.pairs=3").pairs
    assert {split: len(given) for split, given in pairs.items()} == {"eval": 3, "train": 3}


@pytest.mark.parametrize(
    "override",
    ["report.pairs=3", "report.samples=3", "data.max_response_length=2", "stages.policy.data.max_response_length=2"],
)
def test_the_hash_follows_the_prompts_and_pairs(eval_set: Any, override: str) -> None:
    assert eval_set(override).content_hash() != eval_set().content_hash()


@pytest.mark.parametrize(
    "override", ["stages.dpo.train.learning_rate=0.5", "stages.dpo.data.reverse_preferences=true", "train.seed=3"]
)
def test_and_not_how_the_models_were_trained(eval_set: Any, override: str) -> None:
    assert eval_set(override).content_hash() == eval_set().content_hash()


def test_the_hashes_are_those_under_which_earlier_runs_have_kept_their_measurements() -> None:
    pairs = {"eval": [[Row([5], [20, 1]), Row([5], [21, 1])]]}
    theirs = {"eval": [[Row([9], [2]), Row([9], [4])]]}
    kept = EvalSet(build_tokenizer(), frozenset({1, 3}), [[5, 6], [7]], [], pairs, {"theirs": theirs})
    assert kept.content_hash() == "144ca5d6f4e7363c39ca065062aa29e86f1306152edc4448ad72bf1b3fdf96db"
    assert kept.pairs_hash("theirs") == "5c11f8876651071c6898209bba7b9b40c68f42a94c843599fb5a87f8e4d0a991"
    assert kept.pairs_hash("ours") == ""
