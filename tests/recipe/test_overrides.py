import pytest

from aligndistil.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.seed=3", ("train", "seed"), 3),
        ("train.learning_rate=1e-6", ("train", "learning_rate"), 1e-6),
        ("train.learning_rate=1", ("train", "learning_rate"), 1.0),
        ("data.reverse_preferences=true", ("data", "reverse_preferences"), True),
        ("train.adam_betas=[0.8, 0.9]", ("train", "adam_betas"), [0.8, 0.9]),
        ("engine={zero_stage: 0}", ("engine", "zero_stage"), 0),
        ("model.chat_template='1'", ("model", "chat_template"), "1"),
        ("data.train.path=a=b", ("data", "train", 0, "path"), "a=b"),
        ("train.seed = 3", ("train", "seed"), 3),
    ],
)
def test_values_are_typed_as_yaml(load, sft, override, path, value):
    found = load(sft, override).stages["sft"].resolved()
    for key in path:
        found = found[key]
    assert found == value


def test_the_last_one_wins(load, sft):
    assert load(sft, "train.seed=1", "train.seed=2").stages["sft"].train.seed == 2


def test_an_index_reaches_into_a_list(load):
    text = "objective: {name: sft}\nmodel: {path: m}\ndata: {train: [{path: a}, {path: b, weight: 2}]}\n"
    sources = load(text, "data.train.1.split=test").stages["sft"].data.train
    assert [(s.path, s.split, s.weight) for s in sources] == [("a", "train", 1), ("b", "test", 2)]


def test_an_index_reaches_into_a_list_that_a_stage_inherits(load):
    text = """\
        objective: {name: sft}
        model: {path: m}
        data: {train: [{path: a}, {path: b}]}
        stages: {x: {}, y: {}}
        """
    stages = load(text, "stages.x.data.train.0.split=test").stages
    assert [s.split for s in stages["x"].data.train] == ["test", "train"]
    assert [s.split for s in stages["y"].data.train] == ["train", "train"]


def test_an_override_may_be_for_one_stage(load, three_stages):
    stages = load(three_stages, "stages.dpo.train.seed=1").stages
    assert (stages["dpo"].train.seed, stages["reverse_dpo"].train.seed) == (1, 0)


def test_an_override_above_the_stages_leaves_what_a_stage_says_itself(load, three_stages):
    text = three_stages.replace("name: dpo, beta: 0.1}}", "name: dpo}, train: {seed: 7}}")
    stages = load(text, "train.seed=1").stages
    assert (stages["dpo"].train.seed, stages["reverse_dpo"].train.seed) == (7, 1)


def test_an_override_that_no_stage_would_see_is_refused(refused, three_stages):
    text = three_stages.replace("beta: 0.1}", "beta: 0.1}, train: {seed: 7}")
    text = text.replace("r: 5}", "r: 5}\n    train: {seed: 7}")
    assert refused(text, "train.seed=1") == [
        "--set: train.seed: has no effect, because every stage has its own; "
        "write `--set stages.aligndistil.train.seed=...`"
    ]


def test_max_steps_on_the_command_line_replaces_the_epochs_of_the_file(load, three_stages):
    stages = load(three_stages, "train.max_steps=2").stages
    assert {stage.train.max_steps for stage in stages.values()} == {2}


def test_another_objective_on_the_command_line_drops_the_hyperparameters_of_the_old_one(load, three_stages):
    stage = load(three_stages, "stages.dpo.objective.name=sft", "stages.dpo.models=null").stages["dpo"]
    assert stage.objective.model_dump() == {"name": "sft"}


def test_null_on_the_command_line_switches_a_section_off(load, three_stages):
    assert load(three_stages, "stages.aligndistil.rollout=null").stages["aligndistil"].rollout is None


def test_name_and_report_can_be_set(load, three_stages):
    recipe = load(three_stages, "name=x", "report.samples=3", "report.kl_to=stage:dpo")
    assert (recipe.name, str(recipe.output_dir), recipe.report.samples) == ("x", "runs/x", 3)
    assert recipe.report.kl_to == "stage:dpo"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.learning_rat=1", "--set: train.learning_rat: unknown key; did you mean `learning_rate`?"),
        ("trian.seed=1", "--set: trian: unknown key; did you mean `train`?"),
        ("train.seed.x=1", "--set: train.seed: must be a whole number, not a mapping"),
        ("train.seed=yes", "--set train.seed: `yes` is a boolean to some YAML readers"),
        ("train.seed='1'", "--set: train.seed: must be a whole number, not the string '1': remove the quotes"),
        ("train.seed", "--set train.seed: write it as KEY=VALUE, for example `--set train.seed=1`"),
        ("=1", "--set =1: write it as KEY=VALUE, for example `--set train.seed=1`"),
        ("train..seed=1", "--set train..seed=1: write it as KEY=VALUE"),
        ("train.seed=", "--set train.seed=: there is no value after `=`; write `null` to switch a default off"),
        ("extends=x.yaml", "--set extends=x.yaml: `extends` cannot be set; it belongs in the file"),
        (
            "data.train.0.split=x",
            "--set data.train.0.split=x: `0` would be the index of a list, but `data.train` is not a list; "
            "leave it out",
        ),
        (
            "stages.sft.train.seed=1",
            "--set stages.sft.train.seed=1: this recipe has no `stages`; write `--set train.seed=1`",
        ),
    ],
)
def test_overrides_that_cannot_be_are_refused(refused, sft, override, line):
    lines = refused(sft, override)
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_an_override_for_an_unknown_stage_is_refused(refused, three_stages):
    assert refused(three_stages, "stages.dop.train.seed=1") == [
        "--set stages.dop.train.seed=1: no stage is named `dop`; did you mean `dpo`? "
        "The stages are `aligndistil`, `dpo` and `reverse_dpo`"
    ]


def test_an_index_past_the_end_is_refused(refused):
    text = "objective: {name: sft}\nmodel: {path: m}\ndata: {train: [{path: a}, {path: b}]}\n"
    assert refused(text, "data.train.2.split=x") == [
        "--set data.train.2.split=x: `data.train` is a list of 2; `2` must be an index from 0 to 1"
    ]


def test_a_tilde_is_the_home_folder_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    path = write(
        "r.yaml",
        """\
        output_dir: ~/runs
        objective: {name: dpo}
        model: {path: ~/model, chat_template: ~/chat.jinja}
        models: {reference: ~/model}
        data: {train: [{path: ~/one.jsonl}, {path: "./~/two.jsonl", columns: {prompt: ~x}}]}
        """,
    )
    recipe = load_recipe(path, ["data.eval={path: ~/eval.jsonl}"])
    stage = recipe.stages["dpo"]
    assert str(recipe.output_dir) == "/home/ann/runs"
    assert (stage.model.path, stage.model.chat_template) == ("/home/ann/model", "/home/ann/chat.jinja")
    assert stage.models == {"reference": "/home/ann/model"}
    assert [source.path for source in stage.data.train] == ["/home/ann/one.jsonl", "./~/two.jsonl"]
    assert stage.data.train[1].columns == {"prompt": "~x"}
    assert stage.data.eval[0].path == "/home/ann/eval.jsonl"


def test_a_recipe_extends_one_in_the_home_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("home/base.yaml", "objective: {name: sft}\nmodel: {path: m}\ndata: {train: {path: d}}\n")
    recipe = load_recipe(write("r.yaml", "extends: ~/base.yaml\ntrain: {seed: 5}\n"))
    assert recipe.stages["sft"].train.seed == 5
