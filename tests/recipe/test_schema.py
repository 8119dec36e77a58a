"""Sections and the JSON Schema that editors read."""

import json

import pytest
import yaml
from pydantic import BaseModel

from aligndistil.objectives import registry
from aligndistil.recipe import recipe_schema
from aligndistil.recipe.sections import Header, Section, sections


def every_model_class():
    classes = [Section]
    for cls in classes:
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
    return [*classes, *registry().values()]


def test_the_walk_meets_every_section():
    assert {*sections().values(), Header} < set(every_model_class())


@pytest.mark.parametrize("cls", every_model_class(), ids=lambda cls: cls.__name__)
def test_every_model_class_is_closed_and_frozen(cls: type[BaseModel]):
    assert cls.model_config["extra"] == "forbid"
    assert cls.model_config["frozen"] is True


@pytest.mark.parametrize("cls", [*sections().values(), Header], ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_is(cls: type[BaseModel]):
    assert cls.__doc__
    assert all(field.description for field in cls.model_fields.values())


def valid(text):
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(yaml.safe_load(text))


def test_a_whole_recipe_is_valid(three_stages, sft):
    assert valid(three_stages.replace("1e-4", "0.0001"))
    assert valid(sft)


@pytest.mark.parametrize(
    "text",
    [
        "extends: a.yaml\n",
        "extends: a.yaml\ntrain: {seed: 1}\n",
        "stages: {a: {train: {epochs: null, max_steps: 3}, rollout: null}, b: null, c: {data: {train: {split: x}}}}\n",
        "stages: {a: {objective: {beta: 0.2}}}\n",
        "objective: {name: dpo}\ndata: {train: [{path: a}, {path: b, weight: 2}]}\n",
        "objective: {name: sft}\nengine: {chunk_tokens: auto, deepspeed: {a: 1}}\nreport: {samples: 3}\n",
    ],
)
def test_parts_that_a_person_may_write_are_valid(text):
    assert valid(text)


@pytest.mark.parametrize(
    "text",
    [
        "train: {seed: 1}\n",
        "objective: {name: sft}\ntrain: {learning_rat: 1}\n",
        "objective: {name: sft, beta: 1}\n",
        "objective: {name: nothing}\n",
        "objective: {name: sft}\ntrain: {seed: -1}\n",
        "stages: {a: {output_dir: x}}\n",
        "stages: {a: {model: {dtype: fp16}}}\n",
        "stages: {a: {data: {train: {pth: x}}}}\n",
    ],
)
def test_mistakes_are_not_valid(text):
    assert not valid(text)


def test_editors_show_what_a_field_is():
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$defs"]["Train"]["properties"]["learning_rate"]["description"] == "Peak, after the warm-up."
    assert schema["$defs"]["DPO"]["properties"]["beta"]["description"]
    assert "required" not in schema["$defs"]["Model"]
