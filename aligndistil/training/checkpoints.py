"""Where the loop is, and the checkpoints that keep it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.recipe import Checkpoint


@dataclass(slots=True)
class LoopState:
    """Everything of the loop that a resumed run needs."""

    step: int = 0
    """Optimizer steps taken."""
    num_tokens: int = 0
    objective: dict[str, float] = field(default_factory=dict)
    """What the objective carries from step batch to step batch."""
    pending: dict[str, list[float]] = field(default_factory=dict)
    """Totals and counts since the last logged step."""
    pending_maxima: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """The newest training and (as eval/...) evaluation metrics."""
    seconds: float = 0.0
    """Wall time of all attempts so far."""


class Checkpoints:
    """The checkpoints of one stage, in its folder."""

    def __init__(self, engine: Engine, folder: Path, settings: Checkpoint) -> None:
        self._engine, self._folder, self._keep = engine, folder, settings.keep
        self.every = settings.every

    def restore(self) -> LoopState | None:
        """Load the newest complete checkpoint; None when there is none. Collective; raises as `load_checkpoint`."""
        found = checkpoints(self._folder)
        return LoopState(**load_checkpoint(self._engine, found[-1])) if found else None

    def save(self, state: LoopState) -> None:
        """Keep the engine and the state. Collective."""
        save_checkpoint(self._engine, self._folder, asdict(state), keep=self._keep)
