"""A revision is written once and holds wherever its model is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.errors import UserError
from aligndistil.objectives.base import Role
from aligndistil.recipe import load_recipe

RecipeFile = Callable[[dict[str, Any]], Path]
DATA = {"train": {"path": "pairs.jsonl"}}


def recipe(stages: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"model": {"path": "owner/name", "revision": "v1"}, "data": DATA, "stages": stages, **rest}


def dpo(**rest: Any) -> dict[str, Any]:
    return {"objective": {"name": "dpo"}, "models": {"reference": "owner/name"}, **rest}


def test_it_is_meant_for_every_role_of_every_stage_and_for_the_report(recipe_file: RecipeFile) -> None:
    after = dpo(model={"path": "stage:first"})
    loaded = load_recipe(recipe_file(recipe({"first": dpo(), "after": after}, report={"kl_to": "owner/name"})))
    assert loaded.stages["first"].model.path == "owner/name@v1"
    assert loaded.stages["after"].model.path == "stage:first"
    assert {stage.models[Role.REFERENCE] for stage in loaded.stages.values()} == {"owner/name@v1"}
    assert loaded.report.kl_to == "owner/name@v1"
    assert loaded.stages["after"].resolved()["models"] == {"reference": "owner/name@v1"}


def test_other_models_keep_their_names(recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path in ("owner/other", "owner/name@v2", "builtin:tiny", "models/mine"):
        loaded = load_recipe(recipe_file(recipe({"first": dpo(models={"reference": path})})))
        assert loaded.stages["first"].models[Role.REFERENCE] == path


@pytest.mark.parametrize("path", ["builtin:tiny", "./mine", "owner/name"])
def test_a_model_that_is_not_on_the_hub_has_none(recipe_file: RecipeFile, tmp_path: Path, path: str) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    content = recipe({"first": dpo()}) | {"model": {"path": path, "revision": "v1"}}
    with pytest.raises(
        UserError, match=r"toy.yaml:\d+:3: model.revision: .* is not on the Hub, and has no revisions; rem"
    ):
        load_recipe(recipe_file(content))
    content = {"data": DATA, "stages": {"first": dpo(model={"path": path, "revision": "v1"})}}
    with pytest.raises(
        UserError, match=r"toy.yaml:\d+:\d+: stages.first.model.revision: .* is not on the Hub, and has no"
    ):
        load_recipe(recipe_file(content))


def test_a_stage_with_another_model_does_not_inherit_it(recipe_file: RecipeFile) -> None:
    stage = load_recipe(recipe_file(recipe({"first": dpo(model={"path": "builtin:tiny"})}))).stages["first"]
    assert (stage.model.path, stage.model.revision) == ("builtin:tiny", None)
    assert stage.models[Role.REFERENCE] == "owner/name@v1"


def test_a_stage_with_a_revision_of_its_own_means_its_own(recipe_file: RecipeFile) -> None:
    stages = {"first": dpo(), "second": dpo(model={"revision": "v2"})}
    loaded = load_recipe(recipe_file(recipe(stages)))
    second = loaded.stages["second"]
    assert (second.model.path, second.models[Role.REFERENCE]) == ("owner/name@v2", "owner/name@v2")
    assert loaded.stages["first"].models[Role.REFERENCE] == "owner/name@v1"


def test_two_revisions_leave_a_bare_name_without_a_meaning(recipe_file: RecipeFile) -> None:
    stages = {"first": dpo(), "second": dpo(model={"revision": "v2"})}
    path = recipe_file(recipe(stages, report={"kl_to": "owner/name"}))
    with pytest.raises(
        UserError, match=r"report.kl_to: owner/name has the revisions v1 and v2 .*; write owner/name@REV"
    ):
        load_recipe(path)
