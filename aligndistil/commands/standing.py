"""What becomes of a stage: whether it is skipped, goes on or is trained, and why.

`train` and `train --dry-run` both ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aligndistil.data import content_hash, sources_of
from aligndistil.engine.checkpoint import checkpoints, damage
from aligndistil.engine.processes import Processes
from aligndistil.errors import listed
from aligndistil.models import model_hash
from aligndistil.recipe import Stage, changed_sections, stage_fingerprint, stage_of
from aligndistil.run_folder import Done, StageFolder, sizes_and_times
from aligndistil.training import is_code, source_of

RESULT_VERSION = "5"
"""Raised when the same recipe gives other weights than before, so that finished stages are trained again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What becomes of a stage."""

    action: Literal["skip", "continue", "train"]
    """`train` keeps what is in the stage's folder under another name."""
    why: str
    """A sentence without its end; `to train` where there is nothing to say."""
    done: Done | None
    """What is there, if it is finished, whether it still counts or not."""


def standing(
    stage: Stage,
    folder: StageFolder,
    weights: Mapping[str, str | None],
    fingerprint: str,
    *,
    fresh: bool,
    verify: bool,
    processes: Processes,
) -> Standing:
    """Decide by the stage's folder, as the first process sees it. Collective.

    `weights` are hashes of the models of the stages that it uses, None for one that is trained before it and may become
    any: `fingerprint`, of `fingerprint_of`, then takes it to become what it was. `fresh` and `verify`
    are the options of `train`.
    Raises UserError when done.json cannot be read.
    """
    found: Standing = processes.gather(_decide(stage, folder, weights, fingerprint, fresh, verify))[0]
    if found.action != "continue":
        return found
    for path in reversed(checkpoints(folder.path)):
        if not damage(path, processes, folder.started):
            return Standing("continue", f"an unfinished run of it goes on after step {step_of(path)}", None)
    return Standing("continue", "an unfinished run of it left no whole checkpoint, and is trained from its start", None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _decide(
    stage: Stage, folder: StageFolder, weights: Mapping[str, str | None], fingerprint: str, fresh: bool, verify: bool
) -> Standing:
    done = folder.read_done()
    waits_for = [name for name in stage.inputs if weights[name] is None]
    if not folder.path.is_dir() or not any(folder.path.iterdir()):
        return Standing("train", "to train", None)
    if fresh:
        return Standing("train", "trained again because of --fresh", done)
    if done is None and folder.was_started_as(fingerprint):
        if stage.checkpoint.resume == "never":
            return Standing("train", "an unfinished run was here, and checkpoint.resume is never", None)
        return Standing("continue", "", None)
    if done is None and waits_for:
        first = f"{listed(waits_for)}, trained before it, became the model that it began with"
        return Standing("train", f"an unfinished run is here, which goes on only if {first}", None)
    if done is None:
        return Standing("train", "an unfinished run of another version of this stage was here", None)
    if done.fingerprint != fingerprint:
        return Standing("train", f"trained again because {'; '.join(_changes(stage, done, weights))}", done)
    if not folder.final.is_dir():
        return Standing("train", "trained again because its final model is gone", done)
    touched = verify or sizes_and_times(folder.final) != done.files
    if touched and model_hash(str(folder.final)) != done.weights:
        return Standing("train", "trained again because its final model is not as training left it", done)
    if waits_for:
        return Standing("train", f"trained again unless {listed(waits_for)}, trained before it, becomes the same", done)
    return Standing("skip", f"finished and unchanged, skipped ({done.step} steps, {folder.final})", done)


def _changes(stage: Stage, done: Done, weights: Mapping[str, str | None]) -> list[str]:
    changes = changed_sections(done.resolved, stage.resolved(), scalar=stage.objective.is_scalar)
    others = [name for name, given in weights.items() if name in done.inputs and given not in (None, done.inputs[name])]
    changes += [f"{name}, which it uses, became another model" for name in others if name in stage.inputs]
    return changes or ["its data, its models or this package changed"]


def fingerprint_of(stage: Stage, folder: StageFolder, weights: Mapping[str, str | None]) -> str:
    """Of everything that the stage's result depends on: see `standing` for `weights`.

    Imports the modules of rewards that are Python functions. Raises UserError when something cannot be read, and
    ServiceError when the Hub cannot be reached.
    """
    sources = list(stage.data.train)
    if stage.objective.is_scalar:
        sources += sources_of(stage.data, "eval")  # what the scale of a reward is measured on
    contents = {source.model_dump_json(): content_hash(source) for source in sources}
    for path in (stage.model.path, *stage.models.values()):
        if is_code(path):
            contents[path] = source_of(path)
        elif stage_of(path) is None:
            contents[path] = model_hash(path)
    for named in (stage.model.chat_template, stage.engine.deepspeed):
        contents |= _text_of_file(named)
    inputs = {name: weights[name] for name in stage.inputs}
    if None in inputs.values():
        done = folder.read_done()
        before = done.inputs if done is not None else {}
        inputs = {name: given if given is not None else before.get(name, "") for name, given in inputs.items()}
    return stage_fingerprint(stage, {name: str(given) for name, given in inputs.items()}, contents, RESULT_VERSION)


def _text_of_file(named: object) -> dict[str, str]:
    """The content of a file that a recipe names, by its name; empty for anything else."""
    if not isinstance(named, str) or len(named) > 4096 or "{" in named or not Path(named).is_file():
        return {}
    return {named: Path(named).read_text(encoding="utf-8", errors="replace")}
