"""A model's revision is written once, beside its path, and is meant wherever the recipe names that path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.recipe.header import Report
from aligndistil.recipe.stage import Stage
from aligndistil.recipe.yaml_positions import Node


def with_revisions(stages: Mapping[str, Stage], report: Report, defaults: Node) -> tuple[dict[str, Stage], Report]:
    """Every Hub id `OWNER/NAME` whose revision the recipe says becomes `OWNER/NAME@REVISION`.

    A stage's own revision comes first. Raises UserError where a path is given two revisions.
    """
    known: dict[str, set[str]] = {}
    for path, revision in [_of_defaults(defaults), *((s.model.path, s.model.revision) for s in stages.values())]:
        if revision is not None and _on_hub(path):
            known.setdefault(path, set()).add(revision)
    found = {name: _of_stage(stage, known) for name, stage in stages.items()}
    reported = {
        key: _pinned(path, known, f"report.{key}") for key in ("kl_to", "reward") if (path := getattr(report, key))
    }
    return found, report.model_copy(update=reported)


def _of_defaults(defaults: Node) -> tuple[str, str | None]:
    """The model above `stages`, which may be named by a role alone."""
    path, revision = defaults.find(("model", "path")), defaults.find(("model", "revision"))
    return str(path.value) if path else "", str(revision.value) if revision and revision.value else None


def _of_stage(stage: Stage, known: Mapping[str, set[str]]) -> Stage:
    own = {stage.model.path: {stage.model.revision}} if stage.model.revision else {}
    revisions = {**known, **own}
    model = stage.model.model_copy(update={"path": _pinned(stage.model.path, revisions, stage.where("model", "path"))})
    models = {role: _pinned(path, revisions, stage.where("models", role.value)) for role, path in stage.models.items()}
    return replace(stage, model=model, models=models)


def _pinned(path: str, revisions: Mapping[str, set[str]], where: str) -> str:
    given = sorted(revisions.get(path, ()))
    if len(given) > 1:
        raise UserError(
            f"{where}: {path} has the revisions {' and '.join(given)} in this recipe; write {path}@REVISION"
        )
    return f"{path}@{given[0]}" if given and _on_hub(path) else path


def _on_hub(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()
