"""JSON Schema of what a person may write, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from aligndistil.objectives import registry
from aligndistil.recipe.header import Header
from aligndistil.recipe.sections import SECTIONS

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Any section may be partial, since the rest of it may stand above `stages` or in the recipe it extends."""
    objectives = list(registry().values())
    classes: list[type[BaseModel]] = [*SECTIONS.values(), *objectives, Header]
    keys, document = models_json_schema([(cls, "validation") for cls in classes], title="aligndistil recipe")
    definitions = {name: _partial(schema) for name, schema in document["$defs"].items()}
    names = {cls: keys[cls, "validation"]["$ref"].rpartition("/")[2] for cls in classes}

    def section(cls: type[BaseModel]) -> dict[str, Any]:
        described = definitions[names[cls]].get("description", "")
        return {"anyOf": [{"$ref": f"#/$defs/{names[cls]}"}, {"type": "null"}], "description": described}

    stage = {name: section(cls) for name, cls in SECTIONS.items()}
    stage["objective"] = {
        "description": "What is minimized; its other fields are the hyperparameters.",
        "anyOf": [*({"$ref": f"#/$defs/{names[cls]}"} for cls in objectives), {"type": "null"}],
    }
    definitions["Stage"] = {
        "description": "What a stage says differently from the sections above `stages`.",
        "type": "object",
        "properties": stage,
        "additionalProperties": False,
    }
    header = definitions.pop(names[Header])["properties"]
    return {
        "$schema": _DRAFT,
        "title": "aligndistil recipe",
        "type": "object",
        "properties": {**header, "extends": _EXTENDS, **stage, "stages": _STAGES},
        "additionalProperties": False,
        "anyOf": [{"required": ["stages"]}, {"required": ["objective"]}, {"required": ["extends"]}],
        "$defs": definitions,
    }


_EXTENDS = {
    "description": "A recipe that this one changes; the path is relative to this file.",
    "type": ["string", "null"],
}
_STAGES = {
    "description": "Stages by name. `stage:NAME` is the model a stage ends with; null leaves out an inherited stage.",
    "type": "object",
    "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Stage"}, {"type": "null"}]},
}


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with nothing required, and null allowed: it takes back what another layer of the recipe says."""
    if "properties" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("required", "title")}
    return {**rest, "properties": {key: _nullable(value) for key, value in schema["properties"].items()}}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in (*outer, "title")}
    branches = inner["anyOf"] if list(inner) == ["anyOf"] else [inner]
    if {"type": "null"} not in branches:
        branches = [*branches, {"type": "null"}]
    return {**outer, "anyOf": branches}
