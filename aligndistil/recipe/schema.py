"""JSON Schema of what a person may write, for editors."""

from __future__ import annotations

from typing import Any

from aligndistil.recipe.sections import Header
from aligndistil.recipe.stage import stage_class


def recipe_schema() -> dict[str, Any]:
    """Any section may be partial, since the rest of it may stand above `stages` or in the recipe it extends."""
    header, stage = Header.model_json_schema(), _partial(stage_class().model_json_schema())
    found = header.pop("$defs") | stage.pop("$defs")
    definitions = {name: _partial(definition) for name, definition in sorted(found.items())}
    for section in stage["properties"].values():
        section.pop("default", None)
        if "description" not in section:  # it is the class's
            name = section["anyOf"][0]["$ref"].rpartition("/")[2]
            section["description"] = definitions[name]["description"]
    definitions["Stage"] = stage | {"description": "What a stage says differently from the sections above `stages`."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "aligndistil recipe",
        "type": "object",
        "properties": {**_partial(header)["properties"], "extends": _EXTENDS, **stage["properties"], "stages": _STAGES},
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
    return rest | {"properties": {key: _nullable(value) for key, value in schema["properties"].items()}}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    outer = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in (*outer, "title")}
    # Half an objective may be any of several: what is written elsewhere says which.
    one_of = next(iter(inner.values())) if list(inner) in (["anyOf"], ["oneOf"]) else [inner]
    return outer | {"anyOf": [*one_of, *([] if {"type": "null"} in one_of else [{"type": "null"}])]}
