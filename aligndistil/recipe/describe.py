"""What is wrong with a recipe, in lines of `file:line:column: key: what, and what to do`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.recipe.header import Header, Report
from aligndistil.recipe.nearest import did_you_mean, listed, nearest
from aligndistil.recipe.peers import remark_on
from aligndistil.recipe.sections import SECTIONS, Source
from aligndistil.recipe.yaml_positions import KeyPath, Node, Position, dotted

M = TypeVar("M", bound=BaseModel)

TOP, STAGE = "the top level of the recipe", "a stage"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend."""

    at: Position
    path: KeyPath
    text: str

    def __str__(self) -> str:
        return f"{self.at}: {dotted(self.path)}: {self.text}" if self.path else f"{self.at}: {self.text}"


def raise_all(problems: Iterable[Problem]) -> None:
    """Raises one UserError with a line for each problem, in file order. Does nothing when there is none."""
    lines = dict.fromkeys(str(problem) for problem in sorted(problems, key=lambda problem: problem.at.order))
    if lines:
        raise UserError("\n".join(lines))


def validated(cls: type[M], node: Node, problems: list[Problem]) -> M | None:
    """An instance made of the node, or None after adding to `problems`."""
    try:
        # Strict JSON refuses "0.1" and true for a number, and takes a list for a tuple.
        return cls.model_validate_json(json.dumps(node.plain()), strict=True)
    except ValidationError as error:
        problems.extend(_problems_of(error, cls, node))
        return None


def unknown_key(key: str, siblings: Iterable[str]) -> str:
    """What to say of a key that is none of the `siblings`: its right place, its name here, or the nearest key."""
    siblings = list(siblings)
    name = key.lower().replace("-", "_")
    if name in siblings:
        return f"unknown key; did you mean `{name}`?"
    if name in _homes():
        return f"unknown key; {_belongs(name)}"
    if remark := remark_on(key):
        return f"unknown key; {remark}"
    if guess := did_you_mean(key, siblings):
        return f"unknown key{guess}"
    if elsewhere := nearest(key, _homes(), cutoff=0.8):
        return f"unknown key; did you mean `{elsewhere}`? {_belongs(elsewhere)}"
    return f"unknown key; the keys here are {listed(siblings)}"


def _belongs(name: str) -> str:
    places = listed(_homes()[name], "or")
    for place in (TOP, STAGE):
        places = places.replace(f"`{place}`", place)
    return f"`{name}` belongs to {places}"


@functools.cache
def _homes() -> dict[str, list[str]]:
    """The paths at which each field may stand."""
    homes: dict[str, list[str]] = {name: [TOP, STAGE] for name in ("objective", *SECTIONS)}
    parents: list[tuple[str, type[BaseModel]]] = [(f"{name}.", cls) for name, cls in SECTIONS.items()]
    parents += [("objective.", cls) for cls in registry().values()] + [("data.train.", Source), ("report.", Report)]
    for prefix, cls in parents:
        for field in cls.model_fields:
            found = homes.setdefault(field, [])
            if prefix + field not in found:
                found.append(prefix + field)
    for field in Header.model_fields:
        homes.setdefault(field, []).append(TOP)
    return homes


def _problems_of(error: ValidationError, cls: type[BaseModel], node: Node) -> list[Problem]:
    problems: list[Problem] = []
    wrong: dict[KeyPath, tuple[Node, list[str]]] = {}
    for detail in error.errors(include_url=False):
        loc: KeyPath = detail["loc"]
        found, rest = node.deepest(loc)
        context = detail.get("ctx", {})
        match detail["type"]:
            case "extra_forbidden":
                text = _unknown_field(str(loc[-1]), _class_at(cls, loc[:-1]))
                problems.append(Problem(found.at, found.path, text))
            case "missing":
                problems.append(Problem(found.at, (*found.path, *rest), "is required"))
            case "refused":
                at: KeyPath = (*loc, *context["at"].split("."))
                found, rest = node.deepest(at)
                problems.append(Problem(found.at, (*found.path, *rest), context["text"]))
            case "value_error":
                problems.append(Problem(found.at, found.path, str(context["error"])))
            case "model_type" | "model_attributes_type":
                first = next(iter(_class_at(cls, loc).model_fields))
                wrong.setdefault(found.path, (found, []))[1].append(f"a mapping such as `{{{first}: ...}}`")
            case _:  # the branches of a union each have their say about one value
                wrong.setdefault(found.path, (found, []))[1].append(_expected(detail["type"], context, detail["msg"]))
    for value, expected in wrong.values():
        text = f"must be {' or '.join(dict.fromkeys(expected))}, not {_shown(value)}{_hint(value, expected)}"
        problems.append(Problem(value.value_at, value.path, text))
    return problems


def _class_at(cls: type[BaseModel], loc: KeyPath) -> type[BaseModel]:
    """The model class that stands at a location inside a model of class `cls`."""
    for key in loc:
        if isinstance(key, str) and key in cls.model_fields:
            cls = next(_models_in(cls.model_fields[key].annotation), cls)
    return cls


def _models_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _unknown_field(key: str, cls: type[BaseModel]) -> str:
    objectives = registry()
    if cls in objectives.values():
        name = cls.model_fields["name"].default
        owners = [other for other, candidate in objectives.items() if key in candidate.model_fields]
        if owners:
            fields = [field for field in cls.model_fields if field != "name"]
            has = f"its fields are {listed(fields)}" if fields else "it has no fields"
            return f"unknown key; `{key}` is a field of {listed(owners)}, not of `{name}`: {has}"
    return unknown_key(key, cls.model_fields)


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    """What a value should have been, to stand after "must be"."""
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    if kind in bounds:
        return f"{words[bounds[kind]]} {context[bounds[kind]]:g}"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "`")
        return allowed if allowed.count("`") == 2 else f"one of {allowed}"
    if kind == "string_pattern_mismatch":
        return "made of letters, digits, `.`, `_` and `-`"
    return {
        "float_type": "a number",
        "float_parsing": "a number",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "string_type": "a string",
        "string_too_short": "a string that is not empty",
        "list_type": "a list",
        "tuple_type": "a list",
        "too_short": f"a list of at least {context.get('min_length')}",
        "too_long": f"a list of at most {context.get('max_length')}",
        "dict_type": "a mapping",
    }.get(kind, message)


def _shown(node: Node) -> str:
    if isinstance(node.value, bool):
        return str(node.value).lower()
    if isinstance(node.value, str):
        return f"the string {node.value!r}"
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    return "null" if node.value is None else str(node.value)


def _hint(node: Node, expected: list[str]) -> str:
    if isinstance(node.value, str):
        if re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", node.value) and any("number" in text for text in expected):
            return ": remove the quotes"
        return did_you_mean(node.value, re.findall(r"`([^`]*)`", " ".join(expected)))
    return ": put it in quotes" if "a string" in expected and not isinstance(node.value, dict | list) else ""
