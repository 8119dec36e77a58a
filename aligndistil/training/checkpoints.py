"""Where the loop is, and the checkpoints that keep it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aligndistil.engine.checkpoint import checkpoints, damage, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.recipe import Checkpoint
from aligndistil.run_folder import StageFolder

logger = logging.getLogger(__name__)
WORTH = 20
"""How much longer than saving takes, work may go on unsaved."""
LONGEST = 600.0
"""Seconds after which it is saved whatever it takes."""
BYTES_OF_A_WEIGHT, SLOW_DISK = 16, 1e8


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
        self._engine, self._folder, self._keep, self._every = engine, folder, settings.keep, settings.every
        self._of = StageFolder(folder).started
        self._saved_at, self._cost = time.monotonic(), _first_cost(engine)

    def overdue(self) -> bool:
        """Whether so much work would be lost that saving it is worth its time, by the clock of this process."""
        lost = time.monotonic() - self._saved_at
        return self._every == "auto" and lost > min(WORTH * self._cost, LONGEST)

    def due(self, before: int, after: int) -> bool:
        """Whether a multiple of the recipe's number of steps lies between."""
        return isinstance(self._every, int) and before // self._every != after // self._every

    def restore(self) -> LoopState | None:
        """Load the newest checkpoint that is as it was written; None when there is none.

        Collective; raises as `load_checkpoint`.
        """
        processes = self._engine.processes
        for path in reversed(checkpoints(self._folder)):
            if not (why := damage(path, processes, self._of)):
                return LoopState(**load_checkpoint(self._engine, path))
            if processes.is_main:
                logger.warning("%s is not used: %s", path, why)
        return None

    def save(self, state: LoopState) -> None:
        """Keep the engine and the state. Collective."""
        began = time.monotonic()
        save_checkpoint(self._engine, self._folder, asdict(state), keep=self._keep, of=self._of)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began


def _first_cost(engine: Engine) -> float:
    """Seconds that saving may take, before it was done: weights and AdamW's moments at the speed of a slow disk."""
    trained = [p for deepspeed in engine.deepspeed.values() for p in deepspeed.module.parameters() if p.requires_grad]
    numbers = sum(int(getattr(p, "ds_numel", p.numel())) for p in trained)
    return numbers * BYTES_OF_A_WEIGHT / engine.processes.world / SLOW_DISK
