"""What a loaded recipe is, and what its sections demand of each other."""

import json
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from aligndistil import objectives
from aligndistil.batch import DataKind
from aligndistil.commands.recipes import shipped_recipes
from aligndistil.errors import UserError
from aligndistil.objectives.base import Need, Objective, OnPolicy, Role
from aligndistil.recipe import Rollout, load_recipe, recipe_schema
from aligndistil.recipe.sections import sections


class Sampler(Objective):
    """Learns from its own samples only."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    name: str = "sampler"

    @property
    def needs(self):
        return {Role.POLICY: Need.LOGP, Role.TEACHER: Need.LOGP}


class Group(Objective):
    """Compares the samples of one prompt, which a model of its own kind scores."""

    data = DataKind.RESPONSES
    on_policy = OnPolicy.ALWAYS
    groups = True
    roles: ClassVar = {
        "verifier": "What says how good a sample is.",
        "guide": "What helps.",
    }
    name: Literal["group"] = "group"

    @property
    def needs(self):
        return {Role.POLICY: Need.LOGP, "guide": Need.DISTRIBUTION, "verifier": Need.SCORE}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    known = {**objectives.registry(), "sampler": Sampler, "group": Group}
    monkeypatch.setattr("aligndistil.objectives.registry", lambda: known)


SAMPLER = "objective: {name: sampler}\nmodel: {path: m}\ndata: {train: {path: d}}\nmodels: {teacher: t}\n"


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


def test_an_objective_that_must_sample_asks_for_a_rollout(load, refused):
    assert refused(SAMPLER) == [
        "r.yaml:1:1: rollout: `sampler` learns from its own samples; write for example `rollout: {max_new_tokens: 256}`"
    ]
    assert load(SAMPLER + "rollout: {}\n").stages["sampler"].rollout == Rollout()


def test_only_the_models_an_objective_needs_are_kept(load):
    others = "models: {teacher: t, reference: r}\nstages:\n  x: {}\n  dpo: {objective: {name: dpo}}\n"
    stages = load(SAMPLER.replace("models: {teacher: t}\n", others) + "rollout: {}\n").stages
    assert (stages["x"].models, stages["dpo"].models) == ({Role.TEACHER: "t"}, {Role.REFERENCE: "r"})


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
    roles = {role.value for role in Role if role != Role.POLICY}
    assert set(sections()["models"].model_fields) == roles | {"verifier", "guide"}


GROUP = """\
model: {path: m}
data: {train: {path: d}}
train: {batch_size: 24, micro_batch_size: 2}
stages:
  rm: {objective: {name: reward_model}}
  sft: {objective: {name: sft}}
  group:
    objective: {name: group}
    models: {guide: "stage:sft", verifier: "stage:rm"}
    rollout: {max_new_tokens: 4, samples_per_prompt: 4}
"""


def test_an_objective_may_bring_roles_of_its_own(write, refused):
    path = write("a/b.yaml", GROUP.replace('"stage:sft"', "./guide"))
    stage = load_recipe(path).stages["group"]
    assert stage.models == {"guide": "./a/guide", "verifier": "stage:rm"}
    assert stage.inputs == ("rm",)
    assert list(recipe_schema()["$defs"]["Models"]["properties"])[-2:] == ["verifier", "guide"]
    assert refused(GROUP.replace("verifier:", "verifyer:")) == [
        "r.yaml:9:34: stages.group.models.verifyer: unknown key; did you mean `verifier`?",
    ]
    assert refused(GROUP + "models: {reference: x}\n") == [
        "r.yaml:11:10: models.reference: no stage of this recipe reads this model; remove it"
    ]


def test_a_role_of_an_objective_s_own_is_given_a_stage_of_the_kind_it_reads(refused):
    assert refused(GROUP.replace("stage:sft", "stage:rm").replace('verifier: "stage:rm', 'verifier: "stage:sft')) == [
        "r.yaml:9:21: stages.group.models.guide: "
        "`reward_model` trains a scalar head, not a language model; name a stage that trains one",
        "r.yaml:9:43: stages.group.models.verifier: "
        "`sft` trains a language model, which has no scalar head; name a stage that trains one",
    ]


def test_samples_that_are_compared_are_two_or_more_of_each_prompt(load, refused):
    assert load(GROUP).stages["group"].rollout.samples_per_prompt == 4
    text = "`group` compares the samples of one prompt with each other: write 2 or more"
    at = "stages.group.rollout.samples_per_prompt"
    assert refused(GROUP.replace("prompt: 4", "prompt: 1")) == [f"r.yaml:10:54: {at}: {text}"]
    assert refused(GROUP.replace(", samples_per_prompt: 4", "")) == [f"r.yaml:10:5: {at}: {text}"]
    assert refused(GROUP.replace("    rollout: {max_new_tokens: 4, samples_per_prompt: 4}\n", "")) == [
        "r.yaml:7:3: stages.group.rollout: `group` learns from its own samples; "
        "write for example `rollout: {max_new_tokens: 256, samples_per_prompt: 4}`"
    ]


def test_a_process_has_whole_groups_of_samples_that_are_compared(load):
    group = load(GROUP).stages["group"]
    for processes in (1, 2, 3, 6):
        group.check_processes(processes)
    with pytest.raises(UserError) as caught:
        group.check_processes(4)
    assert str(caught.value) == (
        "r.yaml:3:21: train.batch_size: `group` compares the samples of one prompt with each other, and the "
        "24 / 4 = 6 responses of a process are not a multiple of rollout.samples_per_prompt, 4; "
        "use 16 or 32, or another number of processes"
    )


def test_samples_that_are_not_compared_need_not_be_together(load):
    one = SAMPLER + "rollout: {samples_per_prompt: 4}\ntrain: {batch_size: 24}\n"
    load(one).stages["sampler"].check_processes(12)
    load(one.replace("prompt: 4", "prompt: 1")).stages["sampler"].check_processes(12)


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


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_is_a_recipe_of_the_same_stages(write, name):
    recipe = load_recipe(shipped_recipes()[name])
    path = write("whole.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
    assert load_recipe(path).resolved() == recipe.resolved()
