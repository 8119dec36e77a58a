"""A model's revision is written once, beside its path, and is meant wherever the recipe names that path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.recipe.sections import Report
from aligndistil.recipe.stage import Stage
from aligndistil.recipe.yaml_positions import Node


def with_revisions(stages: Mapping[str, Stage], report: Report, defaults: Node) -> tuple[dict[str, Stage], Report]:
    """Every Hub id `OWNER/NAME` whose revision the recipe says becomes `OWNER/NAME@REVISION`.

    A stage's own revision comes first. Raises UserError where a path is given two revisions, and where a model that is
    not on the Hub is given one.
    """
    known: dict[str, set[str]] = {}
    for path, revision in [_of_defaults(defaults), *(_revision_of(stage, defaults) for stage in stages.values())]:
        if revision is not None:
            known.setdefault(path, set()).add(revision)
    found = {name: _of_stage(stage, known, defaults) for name, stage in stages.items()}
    named = {"kl_to": report.kl_to, "reward": report.reward}
    pinned = {key: _pinned(path, known, f"report.{key}") for key, path in named.items() if path is not None}
    return found, report.model_copy(update=pinned)


def _of_defaults(defaults: Node) -> tuple[str, str | None]:
    """The model above `stages`, which may be named by a role alone."""
    path, revision = defaults.find(("model", "path")), defaults.find(("model", "revision"))
    if path is None or revision is None or revision.value is None:
        return "", None
    if not _on_hub(str(path.value)):
        raise UserError(f"{revision.at}: model.revision: {_why_none(str(path.value))}")
    return str(path.value), str(revision.value)


def _revision_of(stage: Stage, defaults: Node) -> tuple[str, str | None]:
    """None where the revision is of the model above `stages`, and the stage has another, which is not on the Hub."""
    path, revision = stage.model.path, stage.model.revision
    if revision is None or _on_hub(path):
        return path, revision
    own, above = stage.written.find(("model", "revision")), defaults.find(("model", "revision"))
    if own is None or (above is not None and own.at == above.at):
        return path, None
    raise UserError(f"{stage.where('model', 'revision')}: {_why_none(path)}")


def _why_none(path: str) -> str:
    return f"{path} is not on the Hub, and has no revisions; remove it"


def _of_stage(stage: Stage, known: Mapping[str, set[str]], defaults: Node) -> Stage:
    path, revision = _revision_of(stage, defaults)
    revisions = {**known, path: {revision}} if revision is not None else known
    pinned = {"path": _pinned(path, revisions, stage.where("model", "path")), "revision": None}
    models = {role: _pinned(path, revisions, stage.where("models", role)) for role, path in stage.models.items()}
    return stage.model_copy(update={"model": stage.model.model_copy(update=pinned), "models": models})


def _pinned(path: str, revisions: Mapping[str, set[str]], where: str) -> str:
    given = sorted(revisions.get(path, ()))
    if len(given) > 1:
        both = " and ".join(given)
        raise UserError(f"{where}: {path} has the revisions {both} in this recipe; write {path}@REVISION")
    return f"{path}@{given[0]}" if given else path


def _on_hub(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()
