"""Sinks beside metrics.jsonl: the four below, and what other packages offer under `aligndistil.trackers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from aligndistil.errors import MissingError, UserError, guess_and_list
from aligndistil.run_folder.trackers.base import Tracker, TrackerFactory
from aligndistil.run_folder.trackers.guard import Guarded
from aligndistil.run_folder.trackers.mlflow_tracker import MLflow
from aligndistil.run_folder.trackers.tensorboard_tracker import TensorBoard
from aligndistil.run_folder.trackers.trackio_tracker import Trackio
from aligndistil.run_folder.trackers.wandb_tracker import WeightsAndBiases

__all__ = ["TRACKERS", "Tracker", "TrackerFactory", "check_trackers", "open_trackers"]

GROUP = "aligndistil.trackers"


@dataclass(frozen=True, slots=True)
class Known:
    """A tracker of ours; the extra of its name installs what it needs."""

    factory: TrackerFactory
    needs: tuple[str, ...]
    """Modules that must be there."""


TRACKERS = {
    "tensorboard": Known(TensorBoard, ("tensorboard",)),
    "wandb": Known(WeightsAndBiases, ("wandb",)),
    "trackio": Known(Trackio, ("trackio",)),
    "mlflow": Known(MLflow, ("mlflow", "sqlalchemy", "alembic")),
}


def check_trackers(names: Iterable[str], where: str = "logging.trackers") -> None:
    """Raises UserError for an unknown name, and MissingError when what it needs is not installed. Imports none.

    `where` is how a sentence about the names begins.
    """
    known = [*TRACKERS, *sorted(_plugins().keys() - TRACKERS)]
    for name in names:
        if name not in known:
            raise UserError(f"{where}: `{name}` is not a tracker{guess_and_list(name, known, 'trackers')}")
        missing = [module for module in TRACKERS[name].needs if not _installed(module)] if name in TRACKERS else []
        if missing:
            raise MissingError(
                f"{where}: {missing[0]} is not installed, which the tracker {name} needs: "
                f"run `pip install aligndistil[{name}]`, or take {name} out"
            )


def open_trackers(names: Sequence[str], stage_folder: Path, start_step: int = 0) -> list[Tracker]:
    """Trackers by name, which from here on stop nothing when they fail. Raises as `check_trackers` does."""
    check_trackers(names)
    plugins = _plugins()
    factories: dict[str, TrackerFactory] = {
        name: TRACKERS[name].factory if name in TRACKERS else plugins[name].load() for name in names
    }
    return [Guarded(name, partial(factory, stage_folder, start_step)) for name, factory in factories.items()]


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _installed(module: str) -> bool:
    spec = find_spec(module)
    # A folder that happens to have the name (wandb leaves one in the current folder) is a package without an origin.
    return spec is not None and spec.origin is not None
