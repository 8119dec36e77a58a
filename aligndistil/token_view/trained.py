"""A stage that was trained, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aligndistil.errors import UserError
from aligndistil.models import model_hash
from aligndistil.objectives import registry
from aligndistil.objectives.base import Need, Objective, Role
from aligndistil.recipe import Data, Model, Rollout, stage_of
from aligndistil.run_folder import RunFolder, check_as_trained

_RESOLVED = "recipe.resolved.yaml"


@dataclass(frozen=True, slots=True)
class TrainedStage:
    """What looking at a finished stage takes."""

    name: str
    folder: Path
    objective: Objective
    model: Model
    """How models are loaded; `path` is the trained one."""
    named: dict[str, str]
    """The frozen language models, as the recipe names them."""
    paths: dict[str, str]
    """Where they lie."""
    data: Data
    rollout: Rollout | None
    seed: int
    steps: int
    """Optimizer steps taken."""


def find_stage(path: Path) -> TrainedStage:
    """The stage of `stage_folder`.

    Raises UserError when there is none, when it has no language model, or when a model it was compared with is gone.
    """
    return _read(stage_folder(path))


def stage_folder(path: Path) -> Path:
    """A stage's folder itself; of a run's folder the last finished stage, one with a teacher where there is one.

    Raises UserError when there is none.
    """
    if (path / _RESOLVED).is_file():
        return path
    folders = [file.parent for file in path.glob(f"*/{_RESOLVED}") if _is_finished(file.parent)]
    # An archived stage is called NAME.old-1; a stage's own name has no dot.
    folders = [folder for folder in folders if "." not in folder.name]
    if not folders and (seeds := sorted(path.glob(f"seed-*/*/{_RESOLVED}"))):
        raise UserError(f"{path} holds several seeds: give the run of one of them, such as {seeds[0].parent.parent}")
    if not folders:
        what = "holds no finished stage" if path.is_dir() else "is no folder"
        raise UserError(f"{path} {what}: give the folder of a run, or of one of its stages, that `train` finished")
    folders.sort(key=lambda folder: (folder / "done.json").stat().st_mtime_ns)
    teachers = [folder for folder in folders if Role.TEACHER in (_resolved(folder).get("models") or {})]
    return (teachers or folders)[-1]


def _is_finished(folder: Path) -> bool:
    return (folder / "done.json").is_file() and (folder / "final").is_dir()


def _frozen(role: str, need: Need) -> bool:
    return role != Role.POLICY and not need.is_scalar


def _locate(run: RunFolder, role: str, path: str, trained_with: Mapping[str, str]) -> str:
    name = stage_of(path)
    if name is None:
        return path
    final, called = run.stage(name).final, role.replace("_", " ")
    if not final.is_dir():
        raise UserError(f"{final}: the {called} is gone: train stage {name} again, or put it back there")
    done = run.stage(name).read_done()
    if done is None or done.weights != trained_with.get(name):
        raise UserError(
            f"{final}: this is not the {called} that the stage was trained with, since {name} was trained again; "
            "`aligndistil train` on the recipe trains the stage again too"
        )
    check_as_trained(str(final), model_hash)
    return str(final)


def _resolved(folder: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load((folder / _RESOLVED).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        read = None
    if not isinstance(read, dict):
        raise UserError(f"{folder / _RESOLVED} is not what aligndistil writes: train the stage again")
    return read


def _read(folder: Path) -> TrainedStage:
    run = RunFolder(folder.parent)
    stage = run.stage(folder.name)
    done = stage.read_done()
    if done is None or not stage.final.is_dir():
        raise UserError(f"{folder}: the stage is not finished: run `aligndistil train` on its recipe again")
    check_as_trained(str(stage.final), model_hash)
    plain = _resolved(folder)
    try:
        objective = registry()[plain["objective"]["name"]].model_validate(plain["objective"])
        model = Model.model_validate(plain["model"])
        data = Data.model_validate(plain["data"])
        rollout = None if plain.get("rollout") is None else Rollout.model_validate(plain["rollout"])
        named = {role: str(plain["models"][role]) for role, need in objective.needs.items() if _frozen(role, need)}
        seed = int(plain["train"]["seed"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{folder / _RESOLVED} was written by another version of aligndistil ({type(error).__name__}): "
            "train the stage again"
        ) from error
    if objective.is_scalar:
        raise UserError(f"{folder}: the stage trains a scalar head, which gives no distribution over tokens to look at")
    paths = {role: _locate(run, role, path, done.inputs) for role, path in named.items()}
    # The exported tokenizer has the chat template.
    model = model.model_copy(update={"path": str(stage.final), "chat_template": None})
    return TrainedStage(folder.name, folder, objective, model, named, paths, data, rollout, seed, done.step)
