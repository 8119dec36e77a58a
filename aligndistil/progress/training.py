"""The progress of one stage's training: in the view of its run on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

import rich
from rich.console import Console

from aligndistil.progress.steps import Clock, Steps, is_live
from aligndistil.progress.view import RunView

SHOWN = {"loss": "loss", "reward/token_mean": "reward", "rewards/margins": "margin"}
"""Metrics that a plain line shows where a step has them, and what they are called there."""


class TrainingProgress:
    """One stage: step, main metric and its curve, tokens/s, elapsed and remaining time. A context manager."""

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        rank: int = 0,
        show: Mapping[str, str] = SHOWN,
        console: Console | None = None,
        clock: Clock = time.monotonic,
        view: RunView | None = None,
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """`show` maps names of metrics to the words of a plain line; those a step does not have are left out.

        `view` is that of the run the stage belongs to; without one, a terminal shows the stage alone. `history` is the
        lines of metrics.jsonl of a resumed stage, so that its curve begins where the stage did.
        """
        self.stage, self.total, self.start = stage, total, start
        self._show = dict(show)
        self._own: RunView | None = None
        if view is None and rank == 0 and is_live(console or rich.get_console()):
            view = self._own = RunView(stage, {stage: ()}, console=console, clock=clock)
        self._view = view if view is not None and view.live else None
        self._history = history if self._view else ()
        self._steps = Steps(stage, total, start=start, rank=rank, console=console, clock=clock)

    def __enter__(self) -> Self:
        if self._own is not None:
            self._own.__enter__()
            self._own.start(self.stage)
        if self._view is not None:
            self._view.begin_training(self.stage, self.total, self.start, self._history)
        else:
            self._steps.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *error: object) -> None:
        if self._view is not None:
            self._view.end_training()
        else:
            self._steps.__exit__(kind, *error)
        if self._own is not None:
            if kind is None:
                self._own.finish(self.stage)
            self._own.__exit__(kind, *error)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are done, the last one with these metrics."""
        if self._view is not None:
            self._view.update(step, metrics)
            return
        shown = {label: f"{metrics[name]:.3g}" for name, label in self._show.items() if name in metrics}
        if "perf/tokens_per_second" in metrics:
            shown["tok/s"] = f"{metrics['perf/tokens_per_second']:,.0f}"
        self._steps.advance(step - self._steps.done, shown)
