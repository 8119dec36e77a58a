"""Which rewards a recipe's models stand for, and how they rank pairs; what a comparison measures of which recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.errors import UserError
from aligndistil.evaluation.measurements import Measurements, measurements_of
from aligndistil.evaluation.rewards import Reward, contrastive_rewards, own_reward
from aligndistil.objectives.base import ImplicitReward
from aligndistil.objectives.dpo import DPO
from aligndistil.recipe import Recipe, load_recipe
from support.recipes import merged, off_policy, three_stages

RecipeFile = Callable[..., Path]


@pytest.fixture
def load(recipe_file: RecipeFile, pairs_file: Callable[..., str]) -> Callable[..., Recipe]:
    data = pairs_file(6)

    def load(**sections: Any) -> Recipe:
        return load_recipe(recipe_file(merged(three_stages("builtin:tiny", data), sections)))

    return load


def measurements(recipe: Recipe) -> Measurements:
    found = measurements_of(recipe)
    assert found is not None
    return found


def rewards_of(measurements: Measurements) -> list[Reward]:
    own = [own_reward(measurements, name) for name in measurements.recipe.stages]
    return [*(reward for reward in own if reward is not None), *contrastive_rewards(measurements)]


def test_each_reward_of_the_recipe_is_found_once(load: Callable[..., Recipe]) -> None:
    rewards = rewards_of(measurements(load(stages={"scorer": {"objective": {"name": "reward_model"}}})))
    assert rewards == [
        Reward("implicit", "dpo", "initial"),
        Reward("implicit", "reverse", "initial"),
        Reward("score", "scorer"),
        Reward("contrastive", "dpo", "reverse"),
    ]
    assert [reward.name for reward in rewards] == ["dpo / initial", "reverse / initial", "scorer", "dpo / reverse"]


def test_two_opposite_stages_are_a_reward_without_a_policy_between_them(load: Callable[..., Recipe]) -> None:
    opposite = measurements(load(stages={"policy": None}))
    assert Reward("contrastive", "dpo", "reverse") in rewards_of(opposite)
    unlike = measurements(load(stages={"policy": None, "reverse": {"objective": {"beta": 0.3}}}))
    assert [reward.kind for reward in rewards_of(unlike)] == ["implicit", "implicit"]


@pytest.mark.parametrize(
    ("objective", "models", "own"),
    [
        ("kto", {"reference": "builtin:tiny"}, [Reward("implicit", "trained", "initial")]),
        ("tdpo", {"reference": "builtin:tiny"}, [Reward("implicit", "trained", "initial")]),
        ("simpo", {}, [Reward("implicit", "trained", per_token=True)]),
        ("sft", {}, []),
    ],
)
def test_the_objective_says_which_reward_its_policy_stands_for(
    objective: str, models: dict[str, str], own: list[Reward], load: Callable[..., Recipe]
) -> None:
    trained = {"objective": {"name": objective}, "models": models}
    alone = {"dpo": None, "reverse": None, "policy": None, "trained": trained}
    assert rewards_of(measurements(load(stages=alone))) == own


def test_a_reward_is_taken_to_the_stage_s_own_reference(load: Callable[..., Recipe]) -> None:
    """SFT and then DPO: to the model that DPO started from, and to one that is no stage's where that is given."""
    sft = {"objective": {"name": "sft"}}
    after = {"model": {"path": "stage:sft"}, "models": {"reference": "stage:sft"}}
    other = {"objective": {"name": "dpo"}, "models": {"reference": "./other"}}
    stages = {"sft": sft, "dpo": after, "reverse": None, "policy": None, "trained": other}
    found = measurements(load(stages=stages))
    assert own_reward(found, "dpo") == Reward("implicit", "dpo", "sft")
    assert own_reward(found, "sft") is None
    assert own_reward(found, "trained") == Reward("implicit", "trained", "reference.0")
    assert [Path(path).name for path in found.references.values()] == ["other"]


def test_a_reference_without_a_declaration_leaves_no_reward(
    load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPO, "implicit_reward", ImplicitReward.NONE)
    assert [reward.kind for reward in rewards_of(measurements(load()))] == ["contrastive"]


def test_a_pair_is_right_when_the_chosen_response_is_worth_more_and_half_right_for_a_tie() -> None:
    pairs = {
        "dpo": {"eval": [(-3.0, -5.0), (-3.0, -3.0), (-9.0, -1.0), (-2.0, -2.5)]},
        "reverse": {"eval": [(-4.0, -2.0), (-1.0, -1.0), (-9.5, -1.0), (-1.0, -1.5)]},
    }
    lengths = {"eval": [(1, 5), (3, 1), (9, 1), (2, 2)]}
    # dpo - reverse: 1 against -3, -2 against -2, 0.5 against 0, -1 against -1
    assert Reward("contrastive", "dpo", "reverse").right(pairs, lengths, "eval") == "1=1="
    assert Reward("score", "dpo").right(pairs, lengths, "eval") == "1=01"
    # per token: -3 against -1, -1 against -3, -1 against -1, -1 against -1.25
    assert Reward("implicit", "dpo", per_token=True).right(pairs, lengths, "eval") == "01=1"


def test_the_models_and_those_they_are_measured_against_are_the_recipe_s(load: Callable[..., Recipe]) -> None:
    recipe = load(stages={"scorer": {"objective": {"name": "reward_model"}}}, report={"reward_accuracy": True})
    found = measurements(recipe)
    assert list(found.models) == ["initial", "dpo", "reverse", "policy", "scorer"]
    assert found.scalar == {"scorer"}
    assert found.reward == "stage:scorer"
    assert found.reference_stage.name == "policy"
    assert found.kl_to == "stage:dpo"
    assert found.train_pairs is found.reference_stage


def test_without_eval_data_nothing_is_measured(recipe_file: RecipeFile, pairs_file: Callable[..., str]) -> None:
    content = off_policy("builtin:tiny", pairs_file(6))
    del content["data"]["eval"], content["evaluation"]
    assert measurements_of(load_recipe(recipe_file(content))) is None


@pytest.mark.parametrize(
    ("named", "why"), [("stage:nothing", "no stage is named `nothing`"), ("stage:dpo", "`dpo` trains a language model")]
)
def test_a_reward_that_scores_nothing_is_refused(named: str, why: str, load: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=f"report.reward: {why}"):
        load(report={"reward": named})


def test_a_reward_that_is_a_function_scores_no_samples(load: Callable[..., Recipe]) -> None:
    models = {"reference": "builtin:tiny", "critic": "builtin:tiny", "reward": "python:taste:score"}
    stage = {"objective": {"name": "ppo"}, "models": models, "rollout": {"max_new_tokens": 4}}
    assert measurements(load(stages={"trained": stage})).reward is None
