"""The stages of a run and how the training of each goes: drawn on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any, Self

import rich
from rich.console import Console, ConsoleOptions, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from aligndistil.progress.sparkline import Course
from aligndistil.progress.steps import REDRAWS, SHORTEST_BAR, Clock, Steps, bar, duration, fitting, is_live

WAITING, RUNNING, FINISHED, STOPPED = ("○", "dim"), ("▶", "cyan"), ("✓", "green"), ("■", "yellow")
"""A sign and its style."""
WIDEST = 120
"""Columns; a wider terminal stays empty on the right."""
LINES_BELOW = 2
"""What `Training.below` gives."""
SPEED = "perf/tokens_per_second"
SPEEDS = 10
"""Steps over which tokens/s is averaged."""
DEFAULT_HEADLINE = ("loss",)


def label(metric: str) -> str:
    """A short word for a metric, in the singular: margin for rewards/margins, accuracy for rewards/accuracies.

    It is the last part of the name, or the one before where the last only says of which mean or of which models it is:
    reward for reward/token_mean, kl for kl/policy_teacher.
    """
    *above, last = metric.split("/")
    if not above:
        return last
    word = above[-1] if re.fullmatch("(token_)?mean|policy_.*", last) else last
    return re.sub("(?<!s)s$", "", re.sub("ies$", "y", word))


class Training:
    """One stage: how far it is and, once it trains, its speed and the course of the metrics of its headline."""

    def __init__(self, stage: str, inputs: Sequence[str], headline: Sequence[str], lock: RLock) -> None:
        """`lock` is held while figures change, so that the thread that draws sees them whole."""
        self.stage, self.headline, self._lock = stage, headline, lock
        self.inputs = f" ← {', '.join(inputs)}" if inputs else ""
        self.state, self.note, self.took = WAITING, "", ""
        self.steps = Steps(stage, 1, hidden=True)
        self.last: Mapping[str, float] = {}
        """The last value of each metric, when it does not train any more."""
        self.courses: dict[str, Course] = {}
        self._speeds: deque[float] = deque(maxlen=SPEEDS)

    def begin(self, steps: Steps, history: Iterable[Mapping[str, Any]]) -> None:
        """`history` is lines of metrics.jsonl, of which those of training up to the first of `steps` count."""
        with self._lock:
            self.state, self.steps, self.courses = RUNNING, steps, {}
            for line in history:
                if line["split"] == "train" and line["step"] <= steps.start:
                    self._note(line["step"], line)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are done, the last one with these metrics."""
        values = {label(name): f"{metrics[name]:.3g}" for name in ("loss", *self.headline) if name in metrics}
        if SPEED in metrics:
            values["tok/s"] = f"{metrics[SPEED]:,.0f}"
        with self._lock:
            self._note(step, metrics)
            if SPEED in metrics:
                self._speeds.append(metrics[SPEED])
            self.steps.advance(step - self.steps.done, values)

    def _note(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name in self.headline:
            if name in metrics:
                self.courses.setdefault(name, Course()).add(step, metrics[name])

    def end(self, state: tuple[str, str], steps: Steps, took: str, last: Mapping[str, float], note: str = "") -> None:
        """It trains no more, after so many of its steps."""
        with self._lock:
            self.state, self.steps, self.took, self.last, self.note = state, steps, took, last, note

    @property
    def figures(self) -> tuple[str, str, str]:
        """Steps, time and the last value of the main metric, as far as there is something to say."""
        if self.state == WAITING:
            return "", "", ""
        metric = next((f"{name} {self.last[name]:.4g}" for name in self.headline if name in self.last), "")
        left = self.steps.left if self.state == RUNNING else ""
        return self.steps.count, f"{left} left" if left else self.took, metric

    def below(self, width: int) -> Iterator[Text]:
        """The main metric with its course, and below it tokens/s and the other metrics that there is room for."""
        values = [f"{sum(self._speeds) / len(self._speeds):,.0f} tok/s"] if self._speeds else []
        if not self.courses:
            yield Text("the first step is on its way", style="dim", no_wrap=True, overflow="ellipsis")
        else:
            main, *others = [name for name in self.headline if name in self.courses]
            course = self.courses[main]
            text = Text(f"{main} ", no_wrap=True, overflow="ellipsis").append(f"{course.last:.4g} ", style="bold")
            yield text.append(course.sparkline(width - len(text)), style="cyan")
            values += [f"{name} {self.courses[name].last:.4g}" for name in others]
        yield Text(fitting(values, width), style="dim")


class RunView:
    """All stages of a run: a context manager. A terminal shows them while one trains, and as a summary at the end.

    Between trainings the terminal belongs to whatever loads models and data. Anything printed or logged meanwhile, on
    rich's own console or through stdout and stderr, appears above. Where nothing may move, the training of each stage
    has the plain lines of `Steps`. Ranks above 0 show nothing.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, Sequence[str]],
        headlines: Mapping[str, Sequence[str]] | None = None,
        *,
        rank: int = 0,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`stages` in their order, each with the stages it starts from or learns from.

        `headlines` names the metrics of a stage to show, the most telling one first: the first one that its steps have
        is drawn. A stage without a headline shows its loss.
        """
        self.name, self._rank, self._clock = name, rank, clock
        self._console = console or rich.get_console()
        self._live = rank == 0 and is_live(self._console)
        self._began = clock()
        self._lock = RLock()
        self._trained: set[str] = set()
        self._stages: dict[str, Training] = {}
        for stage, inputs in stages.items():
            known = [one for one in inputs if one in self._stages]
            headline = (headlines or {}).get(stage, DEFAULT_HEADLINE)
            self._stages[stage] = Training(stage, known, headline, self._lock)

    def __enter__(self) -> Self:
        self._began = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._trained:
            self._console.print(self)

    @contextmanager
    def training(
        self, stage: str, total: int, start: int = 0, history: Iterable[Mapping[str, Any]] = ()
    ) -> Iterator[Training]:
        """Show how `stage` is trained; it is finished when this ends without an error.

        `start` steps of `total` were done before; `history` is the lines of metrics.jsonl, of which those of the split
        `train` up to that step count.
        """
        steps = Steps(
            stage, total, start=start, rank=self._rank, hidden=self._live, console=self._console, clock=self._clock
        )
        training = self._stages[stage]
        training.begin(steps, history)
        self._trained.add(stage)
        drawing: AbstractContextManager[object] = nullcontext()
        if self._live:
            drawing = Live(self, console=self._console, refresh_per_second=REDRAWS, transient=True)
        state, took = STOPPED, ""
        try:
            with steps, drawing:
                yield training
            state, took = FINISHED, duration(steps.seconds)
        finally:
            if self._live:  # once more: Ctrl-C comes twice where a launcher passes it on
                self._console.show_cursor(True)
            training.end(state, steps, took, {name: course.last for name, course in training.courses.items()})

    def finish(self, stage: str, steps: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """`stage` is finished, with these figures of all its training; earlier, if it was not trained in this view."""
        done = Steps(stage, steps, start=steps, hidden=True)
        note = "" if stage in self._trained else " (earlier)"
        self._stages[stage].end(FINISHED, done, duration(seconds), metrics, note)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        with self._lock:
            stages = list(self._stages.values())
            running = next((stage for stage in stages if stage.state == RUNNING), None)
            if running is not None:  # one line for the title, and one that the cursor stands on
                stages = _fewer(stages, console.height - 2 - LINES_BELOW)
            title = self._title(len(self._stages) - len(stages), width)
            parts = [title, _table(stages, width), *(running.below(width) if running is not None else ())]
        yield from (Constrain(part, width) for part in parts)

    def _title(self, hidden: int, width: int) -> Text:
        states = [stage.state for stage in self._stages.values()]
        parts = [f"{states.count(FINISHED)} of {len(states)} stages finished"] if len(states) > 1 else []
        parts += [duration(self._clock() - self._began), *([f"{hidden} not shown"] if hidden else [])]
        text = Text(f"{self.name}  ", style="bold", no_wrap=True, overflow="ellipsis")
        return text.append(fitting(parts, width - text.cell_len), style="not bold dim")


def _table(stages: Sequence[Training], width: int) -> Table:
    """A line for each stage; its bar has the room that is left; its last metric and inputs stand where they fit."""
    names = [Text.assemble(stage.state, f" {stage.stage}", (stage.note, "dim")) for stage in stages]
    *figures, metrics = [[Text(one) for one in column] for column in zip(*(s.figures for s in stages), strict=True)]
    for_name = width - sum(_widest(column) + 1 for column in figures)
    room = for_name - _widest(names) - SHORTEST_BAR - 1
    if room > _widest(metrics):
        figures.append(metrics)
        room -= _widest(metrics) + 1
    with_inputs = [name.copy().append(stage.inputs, "dim") for name, stage in zip(names, stages, strict=True)]
    if room >= _widest(with_inputs) - _widest(names):
        names = with_inputs
    bars = [[bar(stage.steps.done, stage.steps.total) for stage in stages]] if room >= 0 else []
    table = Table.grid(Column(max_width=max(1, for_name), no_wrap=True), padding=(0, 1, 0, 0), expand=True)
    for _ in bars:
        table.add_column(ratio=1)
    for _ in figures:
        table.add_column(no_wrap=True)
    for row in zip(names, *bars, *figures, strict=True):
        table.add_row(*row)
    return table


def _widest(column: Sequence[Text]) -> int:
    return max(text.cell_len for text in column)


def _fewer(stages: Sequence[Training], room: int) -> list[Training]:
    """Without the first finished and the last waiting ones, where there is no room for all."""
    finished = [stage for stage in stages if stage.state == FINISHED]
    waiting = [stage for stage in stages if stage.state == WAITING]
    hidden = [*finished, *reversed(waiting)][: max(0, len(stages) - room)]
    return [stage for stage in stages if stage not in hidden]
