"""What a stage says while it trains: lines of metrics.jsonl and trackers, and its progress on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from aligndistil.progress import RunView, TrainingProgress
from aligndistil.recipe import Logging
from aligndistil.run_folder import MetricsLog, StageFolder


class StageLog:
    """A context manager; `open` says where the stage starts. Only rank 0 writes and shows."""

    def __init__(
        self, stage: str, folder: StageFolder, settings: Logging, total_steps: int, *, rank: int, view: RunView | None
    ) -> None:
        self.every = settings.every
        self._stage, self._folder, self._trackers = stage, folder, settings.trackers
        self._total, self._rank, self._view = total_steps, rank, view
        self._metrics: MetricsLog | None = None
        self._progress: TrainingProgress | None = None

    def open(self, step: int) -> None:
        """Forget what was logged after `step`, and show the stage as it stands there."""
        history = []
        if self._rank == 0:
            self._metrics = self._folder.open_metrics(self._trackers, step)
            if step == 0:
                self._metrics.truncate(-1)  # a run that starts over evaluates at step 0 again
            history = self._metrics.read()
        self._progress = TrainingProgress(
            self._stage, self._total, start=step, rank=self._rank, view=self._view, history=history
        )
        self._progress.__enter__()

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are done, the last one with these metrics."""
        assert self._progress is not None
        self._progress.update(step, metrics)

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, which the trackers are given too."""
        if self._metrics is not None:
            self._metrics.log(step, split, metrics)

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, *error)
        if self._metrics is not None:
            self._metrics.close()
