"""What a tracker is, and what all of them need to know of a stage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from aligndistil.files import write_text

PROJECT = "aligndistil"
"""The project, or experiment, that runs are filed under unless the tracker's own environment variable names another."""


class Tracker(Protocol):
    """Receives each line of metrics.jsonl.

    It may raise OSError or ServiceError when what it writes to is not there: the run goes on, and the line comes again.
    """

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """`metrics` holds finite values only; the field's names for them are `SPLIT/NAME`, as in `train/loss`."""

    def close(self) -> None:
        """Nothing more will come."""


TrackerFactory = Callable[[Path, int], Tracker]
"""Called with the stage folder, which holds recipe.resolved.yaml, and the step the run resumes from (0: it starts)."""


def run_name(stage_folder: Path) -> str:
    """RUN/STAGE."""
    folder = stage_folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def resolved_recipe(stage_folder: Path) -> dict[str, Any]:
    """The stage with every default; empty when the folder does not say."""
    path = stage_folder / "recipe.resolved.yaml"
    return yaml.safe_load(path.read_bytes()) if path.is_file() else {}


def earlier_id(stage_folder: Path, tracker: str, start_step: int) -> str | None:
    """The id that the tracker gave the run that is resumed here; None when the stage starts at its first step."""
    return _ids(stage_folder).get(tracker) if start_step else None


def keep_id(stage_folder: Path, tracker: str, run_id: str) -> None:
    """Note the tracker's id of this run in STAGE/trackers.json, for a resumed run."""
    ids = _ids(stage_folder) | {tracker: run_id}
    write_text(stage_folder / "trackers.json", json.dumps(ids, indent=2) + "\n")


def ends_badly() -> bool:
    """Whether an error, or Ctrl-C, is what closes the tracker. Only meaningful inside `close`."""
    return sys.exc_info()[0] is not None


def _ids(stage_folder: Path) -> dict[str, str]:
    path = stage_folder / "trackers.json"
    ids: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
    return ids
