"""Recipes that are wrong in ways nobody thought of: dropped, renamed, moved and retyped parts of the shipped ones."""

import json
import random
import re

import pytest
import yaml

from aligndistil.commands.recipes import shipped_recipes
from aligndistil.errors import UserError
from aligndistil.recipe import load_recipe

NAMES = ("quickstart/dpo", "quickstart/ppo", "quickstart/kto", "quickstart/aligndistil", "smollm2/cpu")
KEYS = [
    "objective",
    "models",
    "rollout",
    "train",
    "stages",
    "name",
    "path",
    "lr",
    "epochs",
    "max_steps",
    "teacher",
    "1",
]
KEYS += ["samples_per_prompt", "responses", "revision", "teacher_cache", "Seed", "extends", "policy", "yes", ""]
VALUES = [None, True, 0, -1, 3, 1.5, 10**400, "", "x", "stage:dpo", "python:a", "0.1", "./here", [], {}, [None], [[]]]
VALUES += [{"name": ["dpo"]}, {"name": {"a": 1}}, {"name": 3}, {"path": "a/b", "revision": "v1"}, {"": {"a": [1]}}]
SETS = ["train.seed=1", "train={seed: x, sed: 1}", "rollout={}", "objective={name: [sft]}", "stages.dpo.models=null"]


def places(tree):
    """Every mapping or list with each of its keys or indices."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, child in items:
        yield tree, key
        yield from places(child)


def mutated(tree, chance):
    whole = list(places(tree))
    parent, key = chance.choice(whole)
    other, at = chance.choice(whole)
    match chance.choice(["drop", "rename", "replace", "add", "nest", "list", "copy", "quote"]):
        case "drop":
            del parent[key]
        case "rename" if isinstance(parent, dict):
            parent[chance.choice(KEYS)] = parent.pop(key)
        case "add" if isinstance(parent, dict):
            parent[chance.choice(KEYS)] = chance.choice(VALUES)
        case "nest":
            parent[key] = {chance.choice(KEYS): parent[key]}
        case "list":
            parent[key] = [parent[key]]
        case "copy":
            parent[key] = json.loads(json.dumps(other[at]))
        case "quote":
            parent[key] = str(parent[key])
        case _:
            parent[key] = chance.choice(VALUES)


def text_of(name):
    """A shipped recipe that extends no other."""
    return json.dumps(load_recipe(shipped_recipes()[name]).resolved())


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_recipe_is_loaded_or_refused_at_a_place(write, name):
    text, chance = text_of(name), random.Random(name)
    refused = 0
    for _ in range(60):
        tree = json.loads(text)
        for _ in range(chance.choice([1, 1, 2, 3])):
            mutated(tree, chance)
        # JSON is YAML, and on lines of its own every part has a place.
        path = write("m.yaml", json.dumps(tree, indent=1))
        overrides = chance.sample(SETS, chance.choice([0, 0, 1]))
        try:
            recipe = load_recipe(path, overrides)
        except UserError as error:
            refused += 1
            for line in str(error).splitlines():
                assert re.match(r"(m\.yaml:\d+:\d+|--set( [^ ]+)?): ", line), line
        else:
            again = write("again.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
            assert load_recipe(again).resolved() == recipe.resolved()
    assert 20 < refused < 60
