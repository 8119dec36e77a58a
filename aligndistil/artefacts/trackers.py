"""Sinks beside metrics.jsonl: TensorBoard, and what other packages offer under `aligndistil.trackers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from aligndistil.errors import MissingError, UserError

GROUP = "aligndistil.trackers"


class Tracker(Protocol):
    """Something that is told each line of metrics.jsonl."""

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """`metrics` holds finite values only; the field's names for them are `SPLIT/NAME`, as in `train/loss`."""

    def close(self) -> None:
        """Nothing more will come."""


TrackerFactory = Callable[[Path, int], Tracker]
"""Called with the stage folder, which holds recipe.resolved.yaml, and the step the run resumes from (0: it starts)."""


class TensorBoard:
    """Scalars under STAGE/tensorboard."""

    def __init__(self, stage_folder: Path, start_step: int) -> None:
        self._writer = _summary_writer()(
            log_dir=str(stage_folder / "tensorboard"),
            # Hides what an interrupted run drew after its last checkpoint.
            purge_step=start_step + 1 if start_step else None,
        )

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError(
            "logging.trackers names tensorboard, which is not installed: "
            "run `pip install tensorboard`, or take it out of logging.trackers"
        ) from error
    return SummaryWriter


def open_trackers(names: Sequence[str], stage_folder: Path, start_step: int = 0) -> list[Tracker]:
    """Trackers by name. Raises UserError for an unknown one, MissingError when its package is not installed."""
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    known = sorted({"tensorboard", *plugins})
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"logging.trackers: {unknown[0]!r} is not a tracker; choose from {', '.join(known)}")
    factories: list[TrackerFactory] = [TensorBoard if n == "tensorboard" else plugins[n].load() for n in names]
    return [factory(stage_folder, start_step) for factory in factories]
