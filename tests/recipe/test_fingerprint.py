import pytest

from aligndistil.recipe import changed_sections, stage_fingerprint


@pytest.fixture
def fingerprint(load, three_stages):
    def fingerprint(*overrides, stage="aligndistil", inputs=None, contents=None, version="1"):
        loaded = load(three_stages, *overrides).stages[stage]
        return stage_fingerprint(loaded, inputs or {}, contents or {}, version)

    return fingerprint


def test_a_fingerprint_is_the_same_twice_and_64_hexadecimal_digits(fingerprint):
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 64
    assert int(fingerprint(), 16)


@pytest.mark.parametrize(
    "override",
    [
        "logging.every=3",
        "checkpoint.every=3",
        "evaluation.every=3",
        "report.samples=3",
        "output_dir=elsewhere",
        "data.eval.split=other",
        "engine.teacher_cache=true",
        "engine.zero_stage=1",
        "engine.offload=optimizer",
        "engine.chunk_tokens=7",
        "model.gradient_checkpointing=true",
        "train.micro_batch_size=4",
        "stages.aligndistil.rollout.batch_size=4",
        "stages.dpo.objective.beta=0.2",
    ],
)
def test_what_only_looks_on_does_not_change_it(fingerprint, override):
    assert fingerprint(override) == fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "model.path=other",
        "data.train.split=other",
        "train.batch_size=8",
        "stages.aligndistil.objective.r=6",
        "stages.aligndistil.rollout.temperature=0.5",
        "stages.aligndistil.rollout=null",
    ],
)
def test_what_decides_the_weights_changes_it(fingerprint, override):
    assert fingerprint(override) != fingerprint()


@pytest.mark.parametrize("epochs", [1, 2])
def test_how_a_batch_is_cut_changes_no_result(epochs):
    before, after = (
        {"rollout": {"epochs": epochs, "batch_size": size}, "train": {"micro_batch_size": size}} for size in (1, 4)
    )
    assert changed_sections(before, after) == []


def test_inputs_contents_and_the_version_change_it(fingerprint):
    known = {
        fingerprint(),
        fingerprint(inputs={"dpo": "a"}),
        fingerprint(inputs={"dpo": "b"}),
        fingerprint(contents={"d.jsonl": "a"}),
        fingerprint(contents={"d.jsonl": "b"}),
        fingerprint(version="2"),
    }
    assert len(known) == 6
    assert fingerprint(inputs={"a": "1", "b": "2"}) == fingerprint(inputs={"b": "2", "a": "1"})


def changes(load, text, *overrides):
    before = load(text).stages["aligndistil"].resolved()
    after = load(text, *overrides).stages["aligndistil"].resolved()
    return changed_sections(before, after)


def test_changes_are_put_in_words(load, three_stages):
    assert changes(load, three_stages) == []
    assert changes(load, three_stages, "train.learning_rate=0.002", "data.train.split=other") == [
        "data.train.0.split changed from train to other",
        "train.learning_rate changed from 0.0001 to 0.002",
    ]
    assert changes(load, three_stages, "stages.aligndistil.rollout=null") == ["rollout was removed"]
    assert changes(load, three_stages, "train.max_steps=3") == [
        "train.epochs was removed",
        "train.max_steps changed from null to 3",
    ]
    assert changes(load, three_stages, "logging.every=7", "evaluation.every=2", "data.eval.split=x") == []
    assert changes(load, three_stages, "data.train=[{path: a}, {path: b}]")[0].startswith("data.train changed from [")


def test_the_eval_data_of_a_reward_decide_its_scale(load):
    text = "objective: {name: reward_model}\nmodel: {path: m}\ndata: {train: [{path: d}], eval: {path: e}}\n"

    def reward(*overrides):
        return next(iter(load(text, *overrides).stages.values()))

    def fingerprint(*overrides):
        return stage_fingerprint(reward(*overrides), {}, {}, "1")

    known = {fingerprint(), fingerprint("data.eval.path=x"), fingerprint("evaluation.limit=3")}
    assert len(known) == 3
    assert fingerprint("evaluation.every=3") == fingerprint()
    changes = changed_sections(reward().resolved(), reward("evaluation.limit=3").resolved(), scalar=True)
    assert changes == ["evaluation.limit changed from null to 3"]
