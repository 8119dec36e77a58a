"""Which rewards a recipe's models stand for, and how they rank pairs; what a comparison measures of which recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.errors import UserError
from aligndistil.evaluation import Reward, plan_of, rewards_of
from aligndistil.recipe import Recipe, load_recipe
from support.recipes import merged, off_policy, three_stages

RecipeFile = Callable[..., Path]


@pytest.fixture
def load(recipe_file: RecipeFile, pairs_file: Callable[..., str]) -> Callable[..., Recipe]:
    data = pairs_file(6)

    def load(**sections: Any) -> Recipe:
        return load_recipe(recipe_file(merged(three_stages("builtin:tiny", data), sections)))

    return load


def test_each_reward_of_the_recipe_is_found_once(load: Callable[..., Recipe]) -> None:
    recipe = load(stages={"scorer": {"objective": {"name": "reward_model"}}})
    plan = plan_of(recipe)
    assert plan is not None
    assert rewards_of(recipe, plan) == [
        Reward("score", "scorer", None),
        Reward("implicit", "dpo", "initial"),
        Reward("contrastive", "dpo", "reverse"),
    ]
    assert [reward.name for reward in rewards_of(recipe, plan)] == ["scorer", "dpo / initial", "dpo / reverse"]


def test_two_opposite_stages_are_a_reward_without_a_policy_between_them(load: Callable[..., Recipe]) -> None:
    recipe = load(stages={"policy": None})
    plan = plan_of(recipe)
    assert plan is not None
    assert Reward("contrastive", "dpo", "reverse") in rewards_of(recipe, plan)
    other = load(stages={"policy": None, "reverse": {"objective": {"beta": 0.3}}})
    assert [reward.kind for reward in rewards_of(other, plan)] == ["implicit"]


def test_a_pair_is_right_when_the_chosen_response_is_worth_more_and_a_tie_is_wrong() -> None:
    pairs = {
        "dpo": {"eval": [(-3.0, -5.0), (-3.0, -3.0), (-9.0, -1.0), (-2.0, -2.5)]},
        "reverse": {"eval": [(-4.0, -2.0), (-1.0, -1.0), (-9.5, -1.0), (-1.0, -1.5)]},
    }
    # dpo - reverse: 1 against -3, -2 against -2, 0.5 against 0, -1 against -1
    assert Reward("contrastive", "dpo", "reverse").right(pairs, "eval") == "1010"
    assert Reward("score", "dpo", None).right(pairs, "eval") == "1001"


def test_the_plan_says_who_scores_whom(load: Callable[..., Recipe]) -> None:
    recipe = load(stages={"scorer": {"objective": {"name": "reward_model"}}}, report={"reward_accuracy": True})
    plan = plan_of(recipe)
    assert plan is not None
    assert list(plan.models) == ["initial", "dpo", "reverse", "policy", "scorer"]
    assert plan.scalar == {"scorer"}
    assert plan.reward == "stage:scorer"
    assert plan.judge.name == "policy"
    assert plan.target == "stage:dpo"
    assert plan.train_pairs is plan.judge


def test_without_eval_data_there_is_no_plan(recipe_file: RecipeFile, pairs_file: Callable[..., str]) -> None:
    content = off_policy("builtin:tiny", pairs_file(6))
    del content["data"]["eval"], content["evaluation"]
    assert plan_of(load_recipe(recipe_file(content))) is None


@pytest.mark.parametrize(
    ("named", "why"), [("stage:nothing", "no stage is named `nothing`"), ("stage:dpo", "`dpo` trains a language model")]
)
def test_a_reward_that_scores_nothing_is_refused(named: str, why: str, load: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=f"report.reward: {why}"):
        load(report={"reward": named})


def test_a_reward_that_is_a_function_scores_no_samples(load: Callable[..., Recipe]) -> None:
    models = {"reference": "builtin:tiny", "critic": "builtin:tiny", "reward": "python:taste:score"}
    stage = {"objective": {"name": "ppo"}, "models": models, "rollout": {"max_new_tokens": 4}}
    plan = plan_of(load(stages={"trained": stage}))
    assert plan is not None
    assert plan.reward is None
