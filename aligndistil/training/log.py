"""What is logged while a stage trains: lines of metrics.jsonl and trackers, and its progress on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from aligndistil.progress import RunView, Training
from aligndistil.recipe import Stage
from aligndistil.run_folder import MetricsLog, StageFolder


class StageLog:
    """A context manager; `open` says where the stage starts. Only rank 0 writes and shows."""

    def __init__(
        self, stage: Stage, folder: StageFolder, total_steps: int, *, rank: int, view: RunView | None = None
    ) -> None:
        """`view` is that of the run which the stage belongs to; without one the stage is shown alone."""
        self.every = stage.logging.every
        self._stage, self._folder, self._total_steps = stage, folder, total_steps
        self._rank, self._view = rank, view
        self._stack = ExitStack()
        self._metrics: MetricsLog | None = None
        self._progress: Training | None = None

    def open(self, step: int) -> None:
        """Forget what was logged after `step`, and show the stage as it stands there."""
        name, view, history = self._stage.name, self._view, []
        if self._rank == 0:
            self._metrics = self._folder.open_metrics(self._stage.logging.trackers, step)
            self._stack.enter_context(self._metrics)
            if step == 0:
                self._metrics.truncate(-1)  # a run that starts over evaluates at step 0 again
            history = self._metrics.read()
        if view is None:
            headlines = {name: self._stage.objective.headline}
            view = self._stack.enter_context(RunView(name, {name: ()}, headlines, rank=self._rank))
        self._progress = self._stack.enter_context(view.training(name, self._total_steps, step, history))

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are done, the last one with these metrics."""
        assert self._progress is not None
        self._progress.update(step, metrics)

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, which the trackers are given too."""
        if self._metrics is not None:
            self._metrics.log(step, split, metrics)

    def __enter__(self) -> StageLog:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]
