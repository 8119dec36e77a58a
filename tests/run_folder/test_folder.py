"""The run folder: what it writes, what it refuses to touch, and what survives a kill."""

import json
from pathlib import Path

import pytest
import yaml

from aligndistil.errors import UserError
from aligndistil.files import partial_path, write_text
from aligndistil.run_folder import Done, Environment, RunFolder, StageFolder

ENVIRONMENT = Environment.collect(world_size=2, devices=["H200"])


def opened(path: Path, name: str = "quick", text: str = "name: quick\n") -> RunFolder:
    run = RunFolder(path)
    run.open(name, text, ENVIRONMENT)
    return run


def test_open_writes_the_recipe_as_it_was_written_and_the_environment(tmp_path: Path) -> None:
    opened(tmp_path / "runs" / "quick", text="name: quick  # mine\n")
    assert (tmp_path / "runs/quick/recipe.yaml").read_text() == "name: quick  # mine\n"
    record = json.loads((tmp_path / "runs/quick/environment.json").read_text())
    assert (record["recipe"], record["world_size"], record["devices"]) == ("quick", 2, ["H200"])


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not an aligndistil run|not what aligndistil writes"):
        opened(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_seeds_of_a_recipe_are_no_run_and_are_called_what_they_are(tmp_path: Path) -> None:
    opened(tmp_path / "seed-0")
    with pytest.raises(UserError, match=r"holds the runs of several seeds: go on with `aligndistil compare RECIPE"):
        opened(tmp_path)


def test_alone_keeps_others_out_and_writes_nothing_of_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.alone("quick"):
        with pytest.raises(UserError, match="another process is working in"), RunFolder(run.path).alone("quick"):
            pass
        assert [entry.name for entry in run.path.iterdir()] == [".lock"]
    with run.alone("quick"):
        run.open("quick", "name: quick\n", ENVIRONMENT)
    with pytest.raises(UserError, match="'quick', not of 'other'"), run.alone("other"):
        pass


@pytest.mark.parametrize("content", ["{}", "[1]", "not json"])
def test_an_environment_json_of_someone_else_does_not_make_it_our_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"not an aligndistil run|not what aligndistil writes"):
        opened(tmp_path)
    assert (tmp_path / "environment.json").read_text() == content


def test_the_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, "quick")
    with pytest.raises(UserError, match="'quick', not of 'other'"):
        opened(tmp_path, "other")


def test_opening_again_keeps_unknown_files_and_takes_the_new_text(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path, text="name: quick\nr: 20\n")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "r: 20" in (tmp_path / "recipe.yaml").read_text()


def test_earlier_environments_are_kept_when_they_differ(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.open("quick", "", ENVIRONMENT)
    run.open("quick", "", ENVIRONMENT.model_copy(update={"world_size": 8}))
    run.open("quick", "", ENVIRONMENT.model_copy(update={"world_size": 4}))
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["world_size"] == 4
    assert [earlier["world_size"] for earlier in record["earlier"]] == [2, 8]


def test_a_run_killed_between_its_first_two_files_can_be_started_again(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    opened(tmp_path)
    assert (tmp_path / "recipe.yaml").exists()


def test_a_run_killed_while_writing_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    partial_path(tmp_path / "environment.json").write_text('{"rec')
    opened(tmp_path)
    assert not partial_path(tmp_path / "environment.json").exists()


def test_a_path_that_cannot_be_a_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            opened(path)


DONE = Done(
    fingerprint="abc", weights="def", step=10, seconds=1.5, metrics={"loss": 0.5}, resolved={"train": {"seed": 0}}
)


def test_done_is_read_as_it_was_written(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "dpo")
    assert stage.read_done() is None
    stage.write_done(DONE)
    assert stage.read_done() == DONE


def test_done_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_done(Done(**DONE.model_dump() | {"metrics": {"loss": float("nan"), "kl": 2.0}}))
    done = stage.read_done()
    assert done is not None
    assert done.metrics == {"kl": 2.0}


def test_a_done_file_that_was_spoilt_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text('{"fingerprint": 1}')
    with pytest.raises(UserError, match="delete it to train the stage again"):
        StageFolder(tmp_path).read_done()


def test_samples_are_one_json_object_a_line_under_their_step(tmp_path: Path) -> None:
    path = StageFolder(tmp_path).samples(50, [{"prompt": "Café?", "response": "a\nb"}, {"prompt": "", "response": ""}])
    assert path == tmp_path / "samples" / "step-000050.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"prompt": "Café?", "response": "a\nb"}
    assert "Café" in lines[0]
    assert len(lines) == 2


def test_the_resolved_recipe_keeps_its_order(tmp_path: Path) -> None:
    StageFolder(tmp_path).write_resolved({"objective": {"name": "dpo", "beta": 0.1}, "engine": {"zero_stage": 2}})
    text = (tmp_path / "recipe.resolved.yaml").read_text()
    assert yaml.safe_load(text) == {"objective": {"name": "dpo", "beta": 0.1}, "engine": {"zero_stage": 2}}
    assert text.startswith("objective:\n  name: dpo\n")


def test_archiving_takes_the_next_free_number_and_loses_nothing(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "dpo")
    assert stage.archive() is None
    for number in (1, 2):
        stage.write_done(DONE.model_copy(update={"step": number}))
        assert stage.archive() == tmp_path / f"dpo.old-{number}"
    assert not stage.path.exists()
    kept = [StageFolder(tmp_path / f"dpo.old-{n}").read_done() for n in (1, 2)]
    assert [done.step for done in kept if done] == [1, 2]


def test_clearing_removes_what_was_half_written_and_nothing_else(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.clear_unfinished()
    stage.samples(1, [])
    partial_path(tmp_path / "samples" / "step-000002.jsonl").write_text("{")
    (partial_path(stage.final) / "x").mkdir(parents=True)
    for earlier in ("final.tmp", "checkpoint-12.tmp", ".checkpoint-12.aside"):  # names of earlier versions
        (tmp_path / earlier / "x").mkdir(parents=True)
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / "notes.tmp").write_text("mine")
    stage.clear_unfinished()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "notes.tmp", "samples", "step-000001.jsonl"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "one")
    write_text(tmp_path / "a" / "b.txt", "zwölf")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "zwölf"
    assert len(list((tmp_path / "a").iterdir())) == 1
