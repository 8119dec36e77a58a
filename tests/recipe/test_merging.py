import pytest

from aligndistil.errors import UserError
from aligndistil.recipe import load_recipe


def test_a_stage_overrides_the_defaults_it_names(load, three_stages):
    recipe = load(three_stages)
    assert recipe.stages["reverse_dpo"].data.reverse_preferences
    assert recipe.stages["reverse_dpo"].data.train[0].path == "builtin:reviews"
    assert not recipe.stages["dpo"].data.reverse_preferences


def test_lists_and_scalars_replace(load, sft):
    text = """\
        objective: {name: sft}
        model: {path: m}
        data: {train: [{path: a}, {path: b}]}
        stages:
          one: {data: {train: [{path: c}]}}
          two: {data: {train: {path: d}}}
        """
    stages = load(text).stages
    assert [source.path for source in stages["one"].data.train] == ["c"]
    assert [source.path for source in stages["two"].data.train] == ["d"]


def test_another_objective_does_not_inherit_the_hyperparameters(load):
    text = """\
        model: {path: m}
        data: {train: {path: d}}
        objective: {name: dpo, beta: 0.3, label_smoothing: 0.1}
        models: {reference: m}
        stages:
          same: {objective: {label_smoothing: 0.2}}
          other: {objective: {name: sft}}
        """
    stages = load(text).stages
    assert stages["same"].objective.model_dump() == {"name": "dpo", "beta": 0.3, "label_smoothing": 0.2}
    assert stages["other"].objective.name == "sft"


def test_max_steps_of_a_stage_takes_away_the_epochs_of_the_recipe_and_the_other_way_round(load, three_stages):
    recipe = load(three_stages.replace("name: dpo, beta: 0.1}}", "name: dpo}, train: {max_steps: 3}}"))
    assert recipe.stages["dpo"].train.max_steps == 3
    assert "epochs" not in recipe.stages["dpo"].resolved()["train"]
    assert recipe.stages["reverse_dpo"].train.epochs == 2
    steps = three_stages.replace("epochs: 2", "max_steps: 9")
    recipe = load(steps.replace("name: dpo, beta: 0.1}}", "name: dpo}, train: {epochs: 3}}"))
    assert (recipe.stages["dpo"].train.max_steps, recipe.stages["dpo"].train.epochs) == (None, 3)


def test_null_switches_off_a_section_and_a_field(load, three_stages):
    text = three_stages.replace("epochs: 2}", "epochs: 2, seed: 4}\nrollout: {temperature: 0.5}")
    stages = load(text.replace("rollout: {max_new_tokens: 64}", "rollout: null\n    train: {seed: null}")).stages
    assert stages["aligndistil"].rollout is None
    assert not stages["aligndistil"].on_policy
    assert (stages["aligndistil"].train.seed, stages["dpo"].train.seed) == (0, 4)


def test_null_inside_a_deepspeed_configuration_is_kept(load, sft):
    assert load(sft + "engine: {deepspeed: {a: null}}").stages["sft"].engine.deepspeed == {"a": None}


def test_null_of_an_objective_is_kept_where_it_means_none(load):
    text = "objective: {name: ppo, reward_clip: 3}\nmodel: {path: m}\nmodels: {reference: m, reward: m, critic: m}\n"
    text += "data: {train: [{path: d}]}\nrollout: {max_new_tokens: 8}\n"
    text += "stages: {clipped: {}, open: {objective: {reward_clip: null}}, same: {objective: {gamma: null}}}\n"
    clips = {name: (stage.objective.reward_clip, stage.objective.gamma) for name, stage in load(text).stages.items()}
    assert clips == {"clipped": (3, 1), "open": (None, 1), "same": (3, 1)}


def test_extends_is_a_chain_in_which_the_last_file_wins(write):
    write("a.yaml", "model: {path: m, dtype: float32}\ntrain: {seed: 1, batch_size: 4}\n")
    write("sub/b.yaml", "extends: ../a.yaml\ntrain: {seed: 2}\ndata: {train: {path: d}}\nobjective: {name: sft}\n")
    path = write("c.yaml", "extends: sub/b.yaml\ntrain: {weight_decay: 0.5}\n")
    stage = load_recipe(path).stages["sft"]
    assert (stage.model.dtype, stage.train.batch_size) == ("float32", 4)
    assert (stage.train.seed, stage.train.weight_decay) == (2, 0.5)
    assert stage.where("train", "seed") == "sub/b.yaml:2:15: train.seed"


def test_name_and_output_dir_are_not_inherited(write, sft):
    write("a.yaml", f"name: big\noutput_dir: elsewhere\n{sft}")
    base, child = load_recipe("a.yaml"), load_recipe(write("b.yaml", "extends: a.yaml\n"))
    assert (base.name, str(base.output_dir)) == ("big", "elsewhere")
    assert (child.name, str(child.output_dir)) == ("b", "runs/b")


def test_an_inherited_stage_can_be_left_out(write, three_stages):
    write("a.yaml", three_stages)
    child = write("b.yaml", "extends: a.yaml\nstages: {aligndistil: null}\n")
    assert list(load_recipe(child).stages) == ["dpo", "reverse_dpo"]


def test_recipes_that_extend_each_other_are_refused(write):
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "name: b\nextends: a.yaml\n")
    with pytest.raises(UserError) as caught:
        load_recipe("a.yaml")
    assert str(caught.value) == (
        "b.yaml:2:10: extends: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml"
    )


def test_extending_a_file_that_is_not_there_is_refused(refused):
    assert refused("extends: b.yaml\n") == [
        "r.yaml:1:10: extends: no such file: b.yaml (the path is relative to the recipe that extends it)"
    ]
    assert refused("extends: [b.yaml]\n") == ["r.yaml:1:10: extends: must be the path of one recipe, not ['b.yaml']"]


def test_dotted_paths_are_relative_to_the_recipe_and_others_are_left_alone(write):
    text = """\
        model: {path: ./m, chat_template: ../t.jinja}
        data: {train: [{path: ./d.jsonl}, {path: org/name}, {path: data/x.jsonl}], eval: {path: builtin:reviews}}
        objective: {name: dpo}
        models: {reference: ../../r}
        """
    stage = load_recipe(write("recipes/r.yaml", text)).stages["dpo"]
    assert (stage.model.path, stage.model.chat_template) == ("./recipes/m", "./t.jinja")
    assert [source.path for source in stage.data.train] == ["./recipes/d.jsonl", "org/name", "data/x.jsonl"]
    assert stage.data.eval is not None
    assert stage.data.eval[0].path == "builtin:reviews"
    assert list(stage.models.values()) == ["../r"]


def test_a_path_of_a_base_recipe_is_relative_to_the_base_and_one_of_the_command_line_is_not(write, sft):
    write("base/a.yaml", sft.replace("path: m", "path: ./m").replace("path: d", "path: ./d"))
    path = write("b.yaml", "extends: base/a.yaml\n")
    stage = load_recipe(path, ["data.train.path=./other"]).stages["sft"]
    assert (stage.model.path, stage.data.train[0].path) == ("./base/m", "./other")


def test_an_empty_file_and_a_list_are_no_recipes(refused):
    assert refused("# nothing\n")[0].startswith("r.yaml: the file is empty; ")
    assert refused("- a\n") == ["r.yaml:1:1: a recipe is a mapping of keys, such as `model:` and `objective:`"]


def test_a_share_of_the_training_data_takes_the_place_of_sources_and_the_other_way_round(load, sft):
    sources = sft.replace("{path: d}}", "{path: d}, eval: {path: e, limit: 5}}")
    share = sft.replace("{path: d}}", "{path: d}, eval: {fraction: 0.1, seed: 3}}")
    assert load(sources, "data.eval.fraction=0.2").stages["sft"].data.eval.model_dump() == {"fraction": 0.2, "seed": 0}
    assert load(share, "data.eval.fraction=0.2").stages["sft"].data.eval.model_dump() == {"fraction": 0.2, "seed": 3}
    assert load(share, "data.eval.path=e").stages["sft"].data.eval[0].limit is None
    assert load(sources, "data.eval.path=f").stages["sft"].data.eval[0].limit == 5
    assert load(share, "data.eval=null").stages["sft"].data.eval is None
