"""What a loaded recipe is, and what its sections demand of each other."""

import json
from pathlib import Path

import pytest

from aligndistil.batch import DataKind
from aligndistil.errors import UserError
from aligndistil.objectives.base import Need, Objective, OnPolicy, Role
from aligndistil.recipe import Rollout, load_recipe
from aligndistil.recipe.checks import models_needed, rollout_allowed
from aligndistil.recipe.sections import Models
from aligndistil.recipe.yaml_positions import parse_yaml


class Sampler(Objective):
    """Learns from its own samples only."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    name: str = "sampler"

    @property
    def needs(self):
        return {Role.POLICY: Need.LOGP, Role.TEACHER: Need.LOGP}


def test_a_recipe_of_one_stage_names_it_after_its_objective(load, sft):
    recipe = load(sft)
    assert (recipe.name, recipe.output_dir, list(recipe.stages)) == ("r", Path("runs/r"), ["sft"])
    assert recipe.source_text == sft
    assert recipe.report.samples == 256


def test_defaults_are_the_documented_ones(load, sft):
    stage = load(sft).stages["sft"]
    assert (stage.train.learning_rate, stage.train.batch_size, stage.train.adam_betas) == (1e-6, 128, (0.9, 0.95))
    assert (stage.engine.zero_stage, stage.model.dtype, stage.checkpoint.resume) == (2, "auto", "auto")
    assert stage.rollout is None
    assert not stage.on_policy


def test_an_integer_will_do_for_a_float(load, sft):
    rate = load(sft + "train: {learning_rate: 1}\n").stages["sft"].train.learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


def test_one_source_is_a_list_of_one(load, sft):
    assert [source.path for source in load(sft).stages["sft"].data.train] == ["d"]


def test_a_rollout_makes_a_stage_on_policy(load, three_stages):
    recipe = load(three_stages)
    assert recipe.stages["aligndistil"].on_policy
    assert recipe.stages["aligndistil"].rollout.max_new_tokens == 64


def test_a_default_rollout_is_dropped_where_the_objective_cannot_sample(load, three_stages):
    stages = load(three_stages + "rollout: {temperature: 0.7}\n").stages
    assert stages["dpo"].rollout is None
    assert (stages["aligndistil"].rollout.temperature, stages["aligndistil"].rollout.max_new_tokens) == (0.7, 64)


def test_a_rollout_that_a_stage_cannot_use_is_refused(refused, three_stages):
    text = three_stages.replace("{objective: {name: dpo, beta: 0.1}}", "{objective: {name: dpo}, rollout: {}}")
    assert refused(text) == [
        "r.yaml:10:33: stages.dpo.rollout: `dpo` learns from data alone and samples nothing; remove this section"
    ]


def test_a_default_rollout_that_no_stage_uses_is_refused(refused, sft):
    assert refused(sft + "rollout: {}\nstages: {a: {}, b: {}}\n") == [
        "r.yaml:4:1: rollout: no stage of this recipe samples; remove this section"
    ]


def test_an_objective_that_must_sample_asks_for_a_rollout():
    own = parse_yaml("objective: {name: sampler}", "x.yaml")
    problems = []
    assert rollout_allowed(Sampler(), None, own, own, problems) is None
    assert [str(problem) for problem in problems] == [
        "x.yaml:1:1: rollout: `sampler` learns from its own samples; write for example `rollout: {max_new_tokens: 256}`"
    ]
    assert rollout_allowed(Sampler(), Rollout(), own, own, []) == Rollout()


def test_only_the_models_an_objective_needs_are_kept():
    own = parse_yaml("{}", "x.yaml")
    problems = []
    assert models_needed(Sampler(), Models(teacher="t", reference="r"), own, own, problems) == {Role.TEACHER: "t"}
    assert problems == []


def test_a_default_role_reaches_the_stages_that_need_it(load, three_stages):
    stages = load(three_stages).stages
    assert stages["dpo"].models == {Role.REFERENCE: "builtin:tiny"}
    assert stages["aligndistil"].models == {Role.TEACHER: "stage:dpo", Role.REVERSE_TEACHER: "stage:reverse_dpo"}


def test_a_missing_role_is_refused(refused, three_stages):
    assert refused(three_stages.replace('teacher: "stage:dpo", ', "")) == [
        "r.yaml:8:5: stages.aligndistil.models.teacher: `aligndistil` needs this model: "
        "give a folder, a Hub id, `builtin:NAME` or `stage:NAME`"
    ]
    text = three_stages.replace("models: {reference: builtin:tiny}\n", "")
    assert refused(text)[0] == (
        "r.yaml:9:3: stages.dpo.models.reference: `dpo` needs this model: "
        "give a folder, a Hub id, `builtin:NAME` or `stage:NAME`"
    )


def test_a_role_that_a_stage_names_in_vain_is_refused(refused, three_stages):
    text = three_stages.replace("{objective: {name: dpo, beta: 0.1}}", "{objective: {name: dpo}, models: {teacher: x}}")
    assert refused(text) == [
        "r.yaml:10:42: stages.dpo.models.teacher: `dpo` does not read this model (it reads `reference`); "
        "remove the line"
    ]


def test_a_default_role_that_no_stage_needs_is_refused(refused, sft):
    assert refused(sft + "models: {reference: x}\nstages: {a: {}, b: {}}\n") == [
        "r.yaml:4:10: models.reference: no stage of this recipe reads this model; remove it"
    ]


def test_the_policy_is_no_role_of_models(refused, sft):
    assert refused(sft + "models: {policy: x}\n")[0].startswith("r.yaml:4:10: models.policy: unknown key; ")


def test_every_role_but_the_policy_can_be_written():
    assert set(Models.model_fields) == {role.value for role in Role if role != Role.POLICY}


def test_the_samples_of_a_prompt_divide_the_batch(refused, three_stages):
    assert refused(three_stages.replace("max_new_tokens: 64", "samples_per_prompt: 3")) == [
        "r.yaml:4:42: train.batch_size: 32 is not a multiple of rollout.samples_per_prompt, 3"
    ]


def test_processes_that_do_not_divide_the_batch_are_refused(load, three_stages):
    stage = load(three_stages).stages["dpo"]
    stage.check_processes(4)
    with pytest.raises(UserError) as caught:
        stage.check_processes(3)
    assert str(caught.value) == (
        "r.yaml:4:42: train.batch_size: 32 is not a multiple of micro_batch_size x processes = 8 x 3; "
        "use 24 or 48, or another number of processes"
    )
    with pytest.raises(UserError, match="use 40, or another"):
        stage.check_processes(5)


def test_later_layers_can_say_where_a_field_was_written(load, three_stages):
    recipe = load(three_stages, "train.seed=3")
    stage = recipe.stages["aligndistil"]
    assert stage.where("models", "teacher") == "r.yaml:8:23: stages.aligndistil.models.teacher"
    assert stage.where("data", "train", 0, "path") == "r.yaml:3:22: data.train.path"
    assert stage.where("train", "seed") == "--set: train.seed"
    assert stage.where("train", "weight_decay") == "r.yaml:4:1: train.weight_decay"
    assert stage.where("checkpoint", "every") == "r.yaml:6:3: stages.aligndistil.checkpoint.every"
    assert recipe.where("report", "kl_to") == "r.yaml:1:1: report.kl_to"


def test_a_resolved_stage_is_plain_json_and_can_be_loaded_again(load, three_stages):
    recipe = load(three_stages, "train.max_steps=7")
    resolved = recipe.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["stages"]["dpo"]["objective"] == {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    assert resolved["stages"]["dpo"]["rollout"] is None
    again = load(json.dumps(resolved))
    assert again.resolved() == resolved
    assert list(again.stages) == list(recipe.stages)


def test_a_file_name_that_is_no_name_asks_for_one(write, sft):
    with pytest.raises(UserError, match=r"name: the file is called '_.yaml'; give the recipe a name"):
        load_recipe(write("_.yaml", sft))
