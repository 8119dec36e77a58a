"""A trained stage is found in its folder or in its run's, and a folder that cannot be shown is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.objectives.base import Role
from aligndistil.token_view import find_stage

Finished = Callable[..., Path]


def edit(folder: Path, **sections: object) -> None:
    file = folder / "recipe.resolved.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **sections}))


def test_a_stage_is_read_back_with_its_models_beside_it(finished: Finished) -> None:
    run = finished()
    stage = find_stage(run / "policy")
    assert (stage.name, stage.steps, stage.objective.r) == ("policy", 3, 5)  # type: ignore[attr-defined]
    assert stage.named == {Role.TEACHER: "stage:dpo", Role.REVERSE_TEACHER: "stage:reverse"}
    assert stage.paths[Role.REVERSE_TEACHER] == str(run / "reverse" / "final")
    assert stage.model.path == str(run / "policy" / "final")
    assert stage.rollout is not None
    assert stage.rollout.max_new_tokens == 6


def test_a_run_moved_elsewhere_still_finds_its_models(finished: Finished, tmp_path: Path) -> None:
    moved = shutil.move(finished(), tmp_path / "elsewhere")
    assert find_stage(Path(moved)).paths[Role.TEACHER] == str(tmp_path / "elsewhere" / "dpo" / "final")


def test_of_a_run_the_last_stage_with_a_teacher_is_shown(finished: Finished) -> None:
    run = finished()
    os.utime(run / "policy" / "done.json", ns=(0, 0))
    assert find_stage(run).name == "policy"


def test_of_several_seeds_one_has_to_be_named(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "several").mkdir()
    shutil.move(finished(), tmp_path / "several" / "seed-0")
    with pytest.raises(UserError, match=r"several holds several seeds: give the run of one of them, such as .*seed-0"):
        find_stage(tmp_path / "several")


def test_of_a_run_without_a_teacher_the_last_stage_is_shown(finished: Finished) -> None:
    run = finished()
    shutil.rmtree(run / "policy")
    os.utime(run / "reverse" / "done.json", ns=(0, 0))
    assert find_stage(run).name == "dpo"


def test_archived_and_unfinished_stages_of_a_run_are_not_shown(finished: Finished) -> None:
    run = finished()
    (run / "policy").rename(run / "policy.old-1")
    (run / "reverse" / "done.json").unlink()
    assert find_stage(run).name == "dpo"


def test_an_unfinished_stage_is_refused(finished: Finished) -> None:
    run = finished()
    (run / "policy" / "done.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        find_stage(run / "policy")


def test_a_stage_whose_teacher_is_another_model_now_is_refused(finished: Finished) -> None:
    run = finished()
    done = json.loads((run / "reverse" / "done.json").read_text())
    (run / "reverse" / "done.json").write_text(json.dumps(done | {"weights": "others"}))
    sentence = "this is not the reverse teacher that the stage was trained with, since reverse was trained again"
    with pytest.raises(UserError, match=sentence):
        find_stage(run / "policy")


def test_a_stage_whose_teacher_is_gone_is_refused(finished: Finished) -> None:
    run = finished()
    shutil.rmtree(run / "reverse")
    with pytest.raises(UserError, match="the reverse teacher is gone: train stage reverse again"):
        find_stage(run / "policy")


def test_a_folder_without_a_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished stage"):
        find_stage(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        find_stage(tmp_path / "nothing")


def test_a_resolved_recipe_that_does_not_fit_is_refused(finished: Finished) -> None:
    run = finished()
    edit(run / "policy", objective={"name": "aligndistil", "unknown": 1})
    with pytest.raises(UserError, match="another version of aligndistil"):
        find_stage(run / "policy")


@pytest.mark.parametrize("content", [b": [", b"\xff\xfe", b"- a list"])
def test_a_resolved_recipe_that_is_damaged_is_refused(finished: Finished, content: bytes) -> None:
    run = finished()
    (run / "policy" / "recipe.resolved.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.resolved\.yaml is not what aligndistil writes"):
        find_stage(run / "policy")


SCALAR = [name for name, cls in registry().items() if cls.example().is_scalar]


@pytest.mark.parametrize("name", SCALAR)
def test_a_stage_that_trains_a_scalar_head_is_refused(finished: Finished, name: str) -> None:
    run = finished()
    edit(run / "dpo", objective={"name": name}, models={})
    with pytest.raises(UserError, match="scalar head"):
        find_stage(run / "dpo")
