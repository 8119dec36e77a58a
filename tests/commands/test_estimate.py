"""Steps, tokens and operations of a stage, against the data and arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from aligndistil.batch import DataKind
from aligndistil.commands.estimate import Cost, cost, cost_at_most, operations
from aligndistil.commands.recipes import shipped_recipes
from aligndistil.models import builtin_model, model_size
from aligndistil.objectives.base import Role
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import StageFolder
from aligndistil.training import StageTraining, load_stage_data
from aligndistil.training.memory import Models
from support.estimates import PPO, small_stage

RECIPES = shipped_recipes()


@pytest.fixture
def stage(tmp_path):
    return small_stage(tmp_path)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("quickstart")])
def test_steps_are_those_that_training_takes(name, processes, tmp_path):
    for stage in load_recipe(RECIPES[name]).stages.values():
        launch = StageTraining(stage, StageFolder(tmp_path), lambda path: "builtin:tiny", processes)
        assert cost(stage, launch.data.train).steps == launch.schedule.total_steps


def test_a_rollout_of_several_steps_samples_once(stage):
    # 100 prompts in rollouts of 32 are 4 rollouts, each for 2 passes of 4 steps of 8
    taken = cost_at_most(stage(**PPO))
    assert (taken.examples, taken.steps) == (100, 4 * 2 * 4)
    assert taken.sampled == 4 * 32 * 30
    assert taken.tokens == 32 * 8 * 20


def test_bounds_are_not_below_what_the_data_hold(stage):
    for one in (stage(), stage(objective="name: kto"), stage(**PPO)):
        exact, most = cost(one, load_stage_data(one, str).train), cost_at_most(one)
        assert (exact.examples, exact.steps, exact.kind) == (most.examples, most.steps, most.kind)
        assert exact.tokens <= most.tokens
        assert exact.responses <= most.responses
        assert (exact.exact, most.exact) == (True, False)


def test_rows_that_nobody_knows_have_no_bound(stage):
    unknown = stage()
    source = unknown.data.train[0].model_copy(update={"path": "nobody/knows"})
    data = unknown.data.model_copy(update={"train": [source]})
    assert cost_at_most(unknown.model_copy(update={"data": data})) is None


# ---- operations

SIZE = model_size("builtin:tiny")


def test_a_forward_pass_multiplies_each_token_with_each_weight_of_the_body(stage):
    model = AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.zeros(4, 24, dtype=torch.long), use_cache=False)
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert 4 * 24 * 2 * SIZE.body == pytest.approx(counted, rel=0.01)  # but for the norms


def sft(stage, **model):
    return stage(objective="name: sft", models="", model="".join(f"{key}: {value}, " for key, value in model.items()))


TAKEN = Cost(100, DataKind.RESPONSES, steps=10, tokens=8000, responses=6000, sampled=0, exact=True)
"""80 rows of 100 tokens."""
BODY = 8000 * (2 * SIZE.body + 2 * 100 * SIZE.q_width * SIZE.layers)
HEAD = 6000 * 2 * SIZE.head


def test_training_is_three_forward_passes_and_recomputing_one_more(stage):
    models = Models(SIZE)
    assert operations(sft(stage), models, TAKEN) == pytest.approx(3 * (BODY + HEAD))
    again = sft(stage, gradient_checkpointing="true")
    assert operations(again, models, TAKEN) == pytest.approx(4 * BODY + 3 * HEAD)


def test_under_adapters_weights_have_no_gradient(stage):
    assert operations(sft(stage, lora="{r: 4}"), Models(SIZE), TAKEN) == pytest.approx(2 * (BODY + HEAD))


def test_a_frozen_model_is_one_forward_pass(stage):
    alone = operations(stage(models="", objective="name: simpo"), Models(SIZE), TAKEN)
    both = operations(stage(), Models(SIZE, {Role.REFERENCE: SIZE}), TAKEN)
    rows_of_pairs = 8000 * (2 * SIZE.body + 2 * 50 * SIZE.q_width * SIZE.layers) + HEAD
    assert both - alone == pytest.approx(rows_of_pairs)


def test_a_rollout_is_sampled_once_read_once_and_trained_on_in_every_pass(stage):
    asked = stage(**PPO)
    scalar = replace(SIZE, scalar=True)
    models = Models(SIZE, {Role.REFERENCE: SIZE, Role.REWARD: scalar, Role.CRITIC: scalar})
    taken = cost_at_most(asked)  # 4 rollouts of 32, two passes of 4 steps of 8
    rows, sampled = 32 * 8, 4 * 32
    row = 50 * (2 * SIZE.body + 2 * 50 * SIZE.q_width * SIZE.layers)
    head, thin = 30 * 2 * SIZE.head, 30 * 2 * scalar.head
    trained = rows * (3 * row + 3 * head) + rows * (3 * row + 3 * thin)
    prepared = rows / 2 * (4 * row + 2 * head + 2 * thin)
    assert operations(asked, models, taken) == pytest.approx(trained + prepared + sampled * (row + head), rel=0.02)
