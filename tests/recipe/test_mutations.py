"""Recipes that are wrong in ways nobody thought of: dropped, renamed, moved and retyped parts of the shipped ones."""

import json
import random
import re

import pytest
import yaml

from aligndistil.commands.recipes import shipped_recipes
from aligndistil.errors import UserError, printable
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


UGLY = ["null", "true", "-1", "0", "1e308", "-0.0", ".nan", ".inf", "9" * 300, "9" * 5000, "0x10", "1:30"]
UGLY += ['""', '" "', '"\\0"', '"\\e[31m"', '"a[/]b"', "ａｂｃ", '"\\U0001F600"', "x" * 300, f'"{"x/" * 200}"', "../.."]
UGLY += ["[]", "{}", "[[]]", "[null]", "{a: 1}", "[1, x, null]", '{"": null}', "[" * 40 + "]" * 40, "[" * 800]
UGLY += ["stage:stage:x", "python:::", "builtin:", "https://me:secret@host/x", f"hf_{'a' * 34}", "*a", "&a [*a]", "!!x"]


def leaves(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from leaves(child, (*path, key))


@pytest.mark.parametrize("name", ["quickstart", "quickstart/ppo"])
def test_an_ugly_value_anywhere_is_taken_or_refused(write, name):
    """By `--set` at every key of a recipe: what is wrong has a sentence, which a terminal can be given."""
    tree, chance = json.loads(text_of(name)), random.Random(name)
    recipe = write("m.yaml", json.dumps(tree, indent=1))
    places = list(leaves(tree))
    chosen = [(path, chance.choice(UGLY)) for path in chance.sample(places, 110)]
    chosen += [(chance.choice(places), value) for value in UGLY]
    refused = 0
    for path, value in chosen:
        override = f"{'.'.join(map(str, path))}={value}"
        try:
            load_recipe(recipe, [override])
        except UserError as error:
            refused += 1
            said = printable(str(error))
            assert 0 < len(said) < 3000, override[:200]
            assert not [kept for kept in ("\x1b", "secret", "a" * 34) if kept in said], override[:200]
    assert len(chosen) / 3 < refused < len(chosen)
