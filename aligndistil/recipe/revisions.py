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
    path, above = defaults.find(("model", "path")), defaults.find(("model", "revision"))
    if path is not None and above is not None and above.value is not None:  # a role may name this model, and no stage
        if not _on_hub(str(path.value)):
            raise UserError(f"{above.at}: model.revision: {_without_revisions(str(path.value))}")
        known[str(path.value)] = {str(above.value)}
    own: dict[str, str] = {}
    for name, stage in stages.items():
        model, revision = stage.model, stage.model.revision
        if revision is not None and not _on_hub(model.path):
            written = stage.written.find(("model", "revision"))
            if written is not None and (above is None or written.at != above.at):
                raise UserError(f"{stage.where('model', 'revision')}: {_without_revisions(model.path)}")
            # It is of the model above `stages`, and this stage has another.
        elif revision is not None:
            own[name] = revision
            known.setdefault(model.path, set()).add(revision)
    pinned = {}
    for name, stage in stages.items():
        here = known | ({stage.model.path: {own[name]}} if name in own else {})
        path_at = _pinned(stage.model.path, here, stage.where("model", "path"))
        model = stage.model.model_copy(update={"path": path_at, "revision": None})
        models = {role: _pinned(at, here, stage.where("models", role)) for role, at in stage.models.items()}
        pinned[name] = stage.model_copy(update={"model": model, "models": models})
    named = {"kl_to": report.kl_to, "reward": report.reward, "against": report.against}
    fixed = {key: _pinned(at, known, f"report.{key}") for key, at in named.items() if at is not None}
    return pinned, report.model_copy(update=fixed)


def _without_revisions(path: str) -> str:
    return f"{path} is not on the Hub, and has no revisions; remove it"


def _pinned(path: str, revisions: Mapping[str, set[str]], where: str) -> str:
    given = sorted(revisions.get(path, ()))
    if len(given) > 1:
        both = " and ".join(given)
        raise UserError(f"{where}: {path} has the revisions {both} in this recipe; write {path}@REVISION")
    return f"{path}@{given[0]}" if given else path


def _on_hub(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()
