"""What a terminal shows of a run: the graph of its stages, and how the training of one of them goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from threading import RLock
from typing import Any, Self

import rich
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live

from aligndistil.progress.graph import StageLine, State, graph, title
from aligndistil.progress.panel import PANEL_HEIGHT, Training, main_metric, panel
from aligndistil.progress.steps import Clock, is_live

REDRAWS = 2
"""A second; each takes about 3 ms of Python."""
WIDEST = 120
"""Columns; a wider terminal stays empty on the right."""


class RunView:
    """A context manager around all stages of a run. It draws only while one of them trains, and a summary at the end.

    Between trainings the terminal belongs to whatever loads models and data. Anything printed or logged meanwhile, on
    rich's own console or through stdout and stderr, appears above. Where nothing may move, nothing is shown at all.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, Sequence[str]],
        *,
        rank: int = 0,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`stages` in their order, each with the stages it starts from or learns from."""
        self.name = name
        self._console = console or rich.get_console()
        self.live = rank == 0 and is_live(self._console)
        """Whether this view is drawn; otherwise every method only keeps the state."""
        self._clock = clock
        self._stages = StageLine.of_graph(stages)
        self._training: Training | None = None
        self._lock = RLock()
        self._display: Live | None = None
        self._began = clock()

    def __enter__(self) -> Self:
        self._began = self._clock()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._stop_drawing()
        with self._lock:
            for line in self._stages.values():
                if line.state is State.RUNNING:
                    line.state = State.STOPPED
        if self.live and any(line.state in (State.FINISHED, State.STOPPED) for line in self._stages.values()):
            self._console.print(self)

    def start(self, stage: str) -> None:
        """`stage` is being prepared, and is trained next."""
        with self._lock:
            self._stages[stage].start(self._clock())

    def finish(
        self,
        stage: str,
        steps: int | None = None,
        seconds: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """`stage` is finished, now or (when it was never started here) before; figures that are not given are ours."""
        with self._lock:
            line = self._stages[stage]
            if metrics is not None and (name := main_metric(metrics)) is not None:
                line.metric = (name, metrics[name])
            line.finish(self._clock(), steps, seconds)

    def begin_training(self, stage: str, total: int, start: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Draw from here on. `start` steps of `total` were done before; `history` is what was logged of them."""
        with self._lock:
            line = self._stages[stage]
            line.steps, line.total = start, total
            self._training = Training(line, start, self._clock(), history)
        if self.live:
            self._display = Live(self, console=self._console, refresh_per_second=REDRAWS, transient=True)
            self._display.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done, the last one with these metrics. Raises RuntimeError outside of a training."""
        if self._training is None:
            raise RuntimeError("no stage is being trained")
        with self._lock:
            self._training.update(step, metrics)

    def end_training(self) -> None:
        """Draw no more."""
        self._stop_drawing()
        with self._lock:
            self._training = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        with self._lock:
            now, lines, training = self._clock(), self._stages, self._training
            room = None if training is None else console.height - PANEL_HEIGHT - 2
            parts: list[RenderableType] = [
                title(self.name, lines.values(), now - self._began),
                graph(lines, now, width, room),
            ]
            if training is not None:
                parts.append(panel(training, now, width))
        yield from (Constrain(part, width) for part in parts)

    def _stop_drawing(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            try:
                display.stop()
            finally:  # Ctrl-C comes twice where a launcher passes it on
                self._console.show_cursor(True)
