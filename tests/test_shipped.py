"""Every recipe that comes with the package is right, and says how it is used."""

import json
from pathlib import Path

import pytest
import yaml

from aligndistil import shipped
from aligndistil.errors import UserError
from aligndistil.recipe import load_recipe

RECIPES = shipped.shipped_recipes()


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


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        shipped.find_recipe(Path("quikstart"))


def test_a_copied_recipe_stands_alone(tmp_path):
    shipped.copy_recipe("smollm2/cpu", tmp_path)
    copied = load_recipe(tmp_path / "smollm2" / "cpu.yaml")
    assert copied.resolved()["stages"] == load_recipe(RECIPES["smollm2/cpu"]).resolved()["stages"]
