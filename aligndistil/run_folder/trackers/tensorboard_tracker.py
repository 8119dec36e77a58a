"""TensorBoard: event files in the stage folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """Scalars under STAGE/tensorboard."""

    def __init__(self, stage_folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
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
