"""Every recipe that comes with the package is right, and says how it is used."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from aligndistil.batch import DataKind
from aligndistil.cli import app
from aligndistil.commands import recipes as shipped
from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.recipe import load_recipe

RECIPES = shipped.shipped_recipes()
SMALL = [name for name in RECIPES if name.startswith("quickstart/")]
PAPER = [name for name in RECIPES if name.startswith("paper/")]
MODELS = {"qwen2": "Qwen/Qwen2-1.5B-Instruct", "qwen2.5": "Qwen/Qwen2.5-1.5B-Instruct"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_every_batch_divides(name):
    recipe = load_recipe(RECIPES[name])
    for stage in recipe.stages.values():
        stage.check_processes(1)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_the_schema_in_its_first_line_and_obeys_it(name):
    jsonschema = pytest.importorskip("jsonschema")
    text = RECIPES[name].read_text()
    schema = RECIPES[name].parent / text.splitlines()[0].rpartition("$schema=")[2]
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text()))


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_what_it_is_for_and_the_command(name):
    text = RECIPES[name].read_text()
    assert len(shipped.headline(RECIPES[name])) > 20
    assert f"aligndistil train {name}" in text


def test_a_shipped_name_is_found_with_and_without_folder_and_suffix():
    assert shipped.find_recipe(Path("quickstart")) == RECIPES["quickstart"]
    assert shipped.find_recipe(Path("smollm2/cpu.yaml")) == RECIPES["smollm2/cpu"]
    assert shipped.find_recipe(Path("paper/qwen2.5/table1")) == RECIPES["paper/qwen2.5/table1"]


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        shipped.find_recipe(Path("quikstart"))


@pytest.mark.parametrize("name", ["smollm2/cpu", "paper/qwen2.5/table1"])
def test_a_copied_recipe_stands_alone(tmp_path, name):
    shipped.copy_recipe(name, tmp_path)
    copied = load_recipe(tmp_path / f"{name}.yaml")
    assert copied.resolved()["stages"] == load_recipe(RECIPES[name]).resolved()["stages"]


@pytest.mark.parametrize("name", ["quickstart", "smollm2/cpu", "paper/qwen2.5/table1"])
def test_a_shown_recipe_is_the_same_recipe_with_nothing_left_out(tmp_path, name):
    recipe = load_recipe(RECIPES[name], ["train.seed=7"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(shipped.resolved_text(recipe))
    written = yaml.safe_load(shown.read_text())
    assert "extends" not in written
    assert {stage["train"]["seed"] for stage in written["stages"].values()} == {7}
    assert load_recipe(shown).resolved() == recipe.resolved()


def test_recipes_show_prints_a_recipe_with_what_was_set():
    said = CliRunner().invoke(app, ["recipes", "show", "quickstart", "--set", "stages.aligndistil.objective.r=15"])
    assert said.exit_code == 0
    assert yaml.safe_load(said.stdout)["stages"]["aligndistil"]["objective"]["r"] == 15


# ---- one small recipe an objective


def test_every_objective_has_a_small_recipe():
    trained = {stage.objective.name for name in SMALL for stage in load_recipe(RECIPES[name]).stages.values()}
    assert trained == set(registry())


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_share_model_data_and_seed_and_run_on_two_processes(name):
    for stage in load_recipe(RECIPES[name]).stages.values():
        stage.check_processes(2)
        assert (stage.model.path, stage.train.seed) == ("builtin:tiny", 0)
        assert [(one.path, one.split, one.limit) for one in stage.data.train] == [("builtin:reviews", "train", 1000)]
        rows = 2 if stage.objective.data is DataKind.UNPAIRED else 1
        assert stage.train.batch_size == 16 * rows


# ---- the paper's


def stages_of(name):
    return load_recipe(RECIPES[name]).resolved()["stages"]


@pytest.mark.parametrize("name", PAPER)
def test_every_stage_of_the_paper_has_its_common_settings_on_8_gpus(name):
    recipe = load_recipe(RECIPES[name])
    model = MODELS[name.split("/")[1]]
    for stage in recipe.stages.values():
        stage.check_processes(8)
        assert stage.model.path == (model if stage.name != "reward_model" else MODELS["qwen2.5"])
        assert set(stage.models.values()) <= {model, "stage:dpo", "stage:reverse_dpo", "stage:reward_model"}
        source = stage.data.train[0]
        assert (source.path, source.split) == ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
        train = stage.train
        assert (train.learning_rate, train.batch_size, train.warmup_ratio, train.epochs) == (1e-6, 128, 0.1, 1)
        assert (stage.data.max_prompt_length, stage.data.max_response_length) == (1024, 1024)
        if stage.rollout is not None:
            assert (stage.rollout.max_new_tokens, stage.rollout.temperature, stage.rollout.top_p) == (1024, 1, 1)
            assert stage.rollout.samples_per_prompt == 1


@pytest.mark.parametrize(("model", "on_policy", "off_policy"), [("qwen2", 20, 10), ("qwen2.5", 15, 15)])
def test_table_1_has_every_row_with_the_hyperparameters_of_appendix_c(model, on_policy, off_policy):
    rows = {
        "dpo": {"beta": 0.1},
        "reverse_dpo": {"beta": 0.1},
        "dpo_beta_0_01": {"beta": 0.01},
        "kto": {"beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1},
        "simpo": {"beta": 10, "gamma_beta_ratio": 0.5},
        "tdpo1": {"version": 1, "beta": 0.1},
        "tdpo2": {"version": 2, "beta": 0.1, "alpha": 0.1},
        "reward_model": {},
        "ppo": {"kl_coef": 0.01, "gamma": 1, "gae_lambda": 0.95, "clip_range": 0.2, "reward_clip": 10},
        "rto": {"version": "v2", "beta1": 0.1, "beta2": 0.05},
        "aligndistil_off_policy": {"beta0": 0.1, "r": off_policy, "eps": 0.001, "reward": "contrastive"},
        "aligndistil_on_policy": {"beta0": 0.1, "r": on_policy, "eps": 0.001, "reward": "contrastive"},
    }
    stages = stages_of(f"paper/{model}/table1")
    assert stages.keys() == rows.keys()
    for name, fields in rows.items():
        assert fields.items() <= stages[name]["objective"].items()
    assert [name for name in stages if stages[name]["data"]["reverse_preferences"]] == ["reverse_dpo"]
    assert {name for name in stages if stages[name]["rollout"]} == {"ppo", "rto", "aligndistil_on_policy"}
    for name in ("ppo", "rto"):
        assert stages[name]["train"]["critic_learning_rate"] == 9e-6
        assert (stages[name]["rollout"]["responses"], stages[name]["rollout"]["epochs"]) == (1024, 1)


@pytest.mark.parametrize("model", MODELS)
def test_the_two_policies_of_table_2_differ_in_the_reward_alone(model):
    stages = stages_of(f"paper/{model}/table2")
    assert stages.keys() >= {"dpo", "reverse_dpo", "reward_model"}
    vanilla, contrastive = stages["aligndistil_on_policy_vanilla"], stages["aligndistil_on_policy"]
    assert (vanilla["objective"].pop("reward"), contrastive["objective"].pop("reward")) == ("vanilla", "contrastive")
    assert vanilla.pop("models") == {"teacher": "stage:dpo", "reference": MODELS[model]}
    assert contrastive.pop("models") == {"teacher": "stage:dpo", "reverse_teacher": "stage:reverse_dpo"}
    assert vanilla == contrastive


def test_table_3_has_the_ratios_of_the_paper():
    constant = [s for s in stages_of("paper/qwen2/table3").values() if s["objective"].get("weight") == "constant"]
    ratios = [stage["objective"]["beta0"] / stage["objective"]["beta"] for stage in constant]
    assert ratios == pytest.approx([1, 1.2, 1.5, 1.8, 2], rel=1e-6)
    assert not any(stage["rollout"] for stage in constant)


def test_figure_2_differs_in_the_objective_alone():
    curves = [s for s in stages_of("paper/qwen2/figure2").values() if s["rollout"]]
    objectives = [stage.pop("objective") for stage in curves]
    assert [objective["name"] for objective in objectives] == ["aligndistil", "reinforce", "bandit"]
    assert {(objective["beta"], objective["beta0"]) for objective in objectives} == {(0.08, 0.1)}
    assert curves[0] == curves[1] == curves[2]
    assert curves[0]["data"]["train"][0]["limit"] == 10_000


@pytest.mark.parametrize("model", MODELS)
def test_recipes_that_share_a_run_agree_on_the_stages_they_share(model):
    names = [name for name in PAPER if name.startswith(f"paper/{model}/")]
    assert {load_recipe(RECIPES[name]).output_dir for name in names} == {Path(f"runs/paper-{model}")}
    agreed = {}
    for name in names:
        for stage, resolved in stages_of(name).items():
            assert agreed.setdefault(stage, resolved) == resolved


def test_the_second_model_differs_in_the_model_and_r_alone():
    for name in PAPER:
        if not name.startswith("paper/qwen2/"):
            continue
        first, second = stages_of(name), stages_of(name.replace("qwen2/", "qwen2.5/"))
        text = json.dumps(first).replace(MODELS["qwen2"], MODELS["qwen2.5"])
        first = json.loads(text)
        for stages in (first, second):
            for stage in stages.values():
                stage["objective"].pop("r", None)
        assert first == json.loads(json.dumps(second))


def test_two_recipes_that_extend_one_are_copied_to_one_folder_unless_it_was_edited(tmp_path):
    shipped.copy_recipe("quickstart/kto", tmp_path)
    shipped.copy_recipe("quickstart/ppo", tmp_path)
    (tmp_path / "quickstart.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match=r"quickstart.yaml exists already"):
        shipped.copy_recipe("quickstart/rto", tmp_path)
    with pytest.raises(UserError, match=r"kto.yaml exists already"):
        shipped.copy_recipe("quickstart/kto", tmp_path)


def test_validate_reads_the_deepspeed_file(tmp_path):
    asked = ["validate", "quickstart/dpo", "--set", f"engine.deepspeed={tmp_path / 'none.json'}"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith("--set: engine.deepspeed: cannot read ")
