"""What is wrong with a recipe, in lines of `file:line:column: key: what, and what to do`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aligndistil import objectives
from aligndistil.errors import UserError, did_you_mean, guess_and_list, listed, nearest, shortened
from aligndistil.recipe.other_tools import remark_on
from aligndistil.recipe.sections import KINDS_OF_EVAL, Header, Report, Source, sections
from aligndistil.recipe.yaml_positions import KeyPath, Node, Position, dotted

M = TypeVar("M", bound=BaseModel)

TOP, STAGE = "the top level of the recipe", "a stage"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to put right."""

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


def problem_at(node: Node, path: KeyPath, text: str, *, key: bool = False) -> Problem:
    """A problem with the value at a path, or with its key; where neither was written, with what should hold them."""
    found, rest = node.deepest(path)
    return Problem(found.at if rest or key else found.value_at, (*found.path, *rest), text)


def validated(cls: type[M], node: Node, problems: list[Problem], context: object = None) -> M | None:
    """An instance made of the node, or None after adding to `problems`. `context` is for the class's validators."""
    try:
        # Strict JSON refuses "0.1" and true for a number, and takes a list for a tuple.
        return cls.model_validate_json(json.dumps(node.plain()), strict=True, context=context)
    except ValidationError as error:
        for _, details in itertools.groupby(error.errors(include_url=False), lambda detail: detail["loc"][:1]):
            problems.extend(_problems_of(details, cls, node))
        return None


def _problems_of(details: Iterable[ErrorDetails], cls: type[BaseModel], node: Node) -> Iterator[Problem]:
    wrong: dict[KeyPath, tuple[Node, list[str]]] = {}
    for detail in details:
        # Which kind of a union it is stands between the field and its content.
        loc, owner, inner = tuple(key for key in detail["loc"] if key not in KINDS_OF_EVAL), cls, detail["loc"]
        if len(loc) > 1 and loc[0] == "objective":
            owner, inner = objectives.registry()[str(loc[1])], loc[2:]
            loc = ("objective", *inner)
        found, _ = node.deepest(loc)
        context = detail.get("ctx", {})
        match detail["type"]:
            case "union_tag_not_found" | "union_tag_invalid":
                yield _objective_problem(found)
            case "extra_forbidden":
                yield Problem(found.at, found.path, _unknown_field(str(loc[-1]), _class_at(owner, inner[:-1])))
            case "missing":
                yield problem_at(node, loc, "is required")
            case "refused":
                fields = context["at"].split(".") if context["at"] else []
                yield problem_at(node, (*loc, *fields), context["text"], key=bool(fields))
            case "value_error":
                yield Problem(found.at, found.path, str(context["error"]))
            case "model_type" | "model_attributes_type":
                first = next(iter(_class_at(owner, inner).model_fields))
                wrong.setdefault(found.path, (found, []))[1].append(f"a mapping such as `{{{first}: ...}}`")
            case kind:  # the branches of a union each have their say about one value
                wrong.setdefault(found.path, (found, []))[1].append(_expected(kind, context, detail["msg"]))
    for value, expected in wrong.values():
        text = f"must be {' or '.join(dict.fromkeys(expected))}, not {_shown(value)}{_hint(value, expected)}"
        yield Problem(value.value_at, value.path, text)


def _objective_problem(node: Node) -> Problem:
    known = objectives.registry()
    if node.mapping is None:
        text = f"must be a mapping, for example `objective: {{name: {next(iter(known))}}}`"
        return Problem(node.value_at, node.path, text)
    name = node.child("name")
    if name is None:
        return problem_at(node, ("name",), f"is required; the objectives are {listed(known)}")
    hint = guess_and_list(str(name.plain()), known, "objectives")
    return Problem(name.value_at, name.path, f"unknown objective `{name.plain()}`{hint}")


def _class_at(cls: type[BaseModel], loc: KeyPath) -> type[BaseModel]:
    """The model class that stands at a location inside a model of class `cls`."""
    for key in loc:
        if key in KINDS_OF_EVAL:
            cls = KINDS_OF_EVAL[key]
        elif isinstance(key, str) and key in cls.model_fields:
            cls = next(_models_in(cls.model_fields[key].annotation), cls)
    return cls


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _unknown_field(key: str, cls: type[BaseModel]) -> str:
    known = objectives.registry()
    owners = [name for name, other in known.items() if key in other.model_fields]
    if cls not in known.values() or not owners:
        return unknown_key(key, cls.model_fields)
    fields = [field for field in cls.model_fields if field != "name"]
    has = f"its fields are {listed(fields)}" if fields else "it has no fields"
    name = cls.model_fields["name"].default
    return f"unknown key; `{key}` is a field of {listed(owners)}, not of `{name}`: {has}"


def unknown_key(key: str, siblings: Iterable[str]) -> str:
    """What to say of a key that is none of the `siblings`: its right place, its name here, or the nearest key."""
    siblings, places = list(siblings), _places()
    name = key.lower().replace("-", "_")
    if name in siblings:
        return f"unknown key; did you mean `{name}`?"
    if name in places:
        return f"unknown key; {_belongs(name, places)}"
    if remark := remark_on(key):
        return f"unknown key; {remark}"
    if guess := did_you_mean(key, siblings):
        return f"unknown key{guess}"
    for elsewhere in nearest(key, places, cutoff=0.8):
        return f"unknown key; did you mean `{elsewhere}`? {_belongs(elsewhere, places)}"
    return f"unknown key; the keys here are {listed(siblings)}"


def _belongs(name: str, places: dict[str, list[str]]) -> str:
    found = listed(places[name], "or")
    for place in (TOP, STAGE):
        found = found.replace(f"`{place}`", place)
    return f"`{name}` belongs to {found}"


def _places() -> dict[str, list[str]]:
    """The paths at which each field may stand."""
    classes = sections()
    parents: list[tuple[str, type[BaseModel]]] = [(f"{name}.", cls) for name, cls in classes.items()]
    parents += [("objective.", cls) for cls in objectives.registry().values()]
    parents += [("data.train.", Source), ("report.", Report)]
    places: dict[str, dict[str, None]] = {name: {TOP: None, STAGE: None} for name in ("objective", *classes)}
    for prefix, cls in parents:
        for field in cls.model_fields:
            places.setdefault(field, {})[prefix + field] = None
    for field in Header.model_fields:
        places.setdefault(field, {})[TOP] = None
    return {field: list(found) for field, found in places.items()}


_EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "string_too_long": "a string of at most {max_length} characters",
    "string_pattern_mismatch": "made of letters, digits, `.`, `_` and `-`",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "dict_type": "a mapping",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}
"""Pydantic's kinds of error -> what the value should have been, to stand after "must be"."""


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "`")
        return allowed if allowed.count("`") == 2 else f"one of {allowed}"
    return _EXPECTED[kind].format(**context) if kind in _EXPECTED else message


def _shown(node: Node) -> str:
    match node.value:
        case None:
            return "null"
        case bool():
            return str(node.value).lower()
        case str():
            return f"the string {shortened(repr(node.value))}"
        case dict():
            return "a mapping"
        case list():
            return f"a list of {len(node.value)}"
    return shortened(str(node.value))


def _hint(node: Node, expected: list[str]) -> str:
    if isinstance(node.value, str):
        if re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", node.value) and any("number" in text for text in expected):
            return ": remove the quotes"
        return did_you_mean(node.value, re.findall(r"`([^`]*)`", " ".join(expected)))
    return ": put it in quotes" if "a string" in expected and not isinstance(node.value, dict | list) else ""
