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
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from aligndistil.progress.sparkline import Course
from aligndistil.progress.steps import REDRAWS, Clock, Steps, duration, fitting, is_live

WAITING, RUNNING, FINISHED, STOPPED = "[dim]○[/]", "[cyan]▶[/]", "[green]✓[/]", "[yellow]■[/]"
NAME = "{task.fields[state]} {task.description}[dim]{task.fields[note]}[/]"
INPUTS = "[dim]{task.fields[inputs]}[/]"
COUNT, TIME, METRIC = "{task.fields[count]}", "{task.fields[time]}", "{task.fields[metric]}"
"""What stands in a stage's line, in console markup."""
WIDEST = 120
"""Columns; a wider terminal stays empty on the right."""
SHORTEST_BAR = 4
LINES_BELOW = 2
"""What `Training.lines` gives."""
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
    """One stage while it trains: its steps, its speed, and the course of the metrics of its headline."""

    def __init__(
        self, steps: Steps, headline: Sequence[str], history: Iterable[Mapping[str, Any]], lock: RLock
    ) -> None:
        """`lock` is held while figures change, so that the thread that draws sees them whole."""
        self.steps, self.headline, self._lock = steps, headline, lock
        self.courses: dict[str, Course] = {}
        self._speeds: deque[float] = deque(maxlen=SPEEDS)
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

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric of the headline."""
        return {name: course.last for name, course in self.courses.items()}

    def lines(self, width: int) -> Iterator[Text]:
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
        self.name, self._headlines, self._rank, self._clock = name, headlines or {}, rank, clock
        self._console = console or rich.get_console()
        self._live = rank == 0 and is_live(self._console)
        self._began = clock()
        self._lock = RLock()
        self._training: Training | None = None
        self._trained: set[str] = set()
        self._bars = Progress(console=self._console, get_time=clock, expand=True)  # drawn by us, never started
        self._tasks: dict[str, TaskID] = {}
        for stage, inputs in stages.items():
            known = ", ".join(escape(one) for one in inputs if one in self._tasks)
            inputs_text = f" ← {known}" if known else ""
            self._tasks[stage] = self._bars.add_task(
                escape(stage), total=1, state=WAITING, inputs=inputs_text, note="", count="", time="", metric=""
            )

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
        training = Training(steps, self._headlines.get(stage, DEFAULT_HEADLINE), history, self._lock)
        self._trained.add(stage)
        self._training = training
        drawing: AbstractContextManager[object] = nullcontext()
        if self._live:
            drawing = Live(self, console=self._console, refresh_per_second=REDRAWS, transient=True)
        state = STOPPED
        try:
            with steps, drawing:
                yield training
            state = FINISHED
        finally:
            if self._live:  # once more: Ctrl-C comes twice where a launcher passes it on
                self._console.show_cursor(True)
            with self._lock:
                self._training = None
                took = duration(steps.seconds) if state == FINISHED else ""
                self._show(stage, state, steps.done, total, took, training.last)

    def finish(self, stage: str, steps: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """`stage` is finished, with these figures of all its training; earlier, if it was not trained in this view."""
        with self._lock:
            self._show(stage, FINISHED, steps, steps, duration(seconds), metrics)
            if stage not in self._trained:
                self._bars.update(self._tasks[stage], note=" (earlier)")

    def _show(
        self, stage: str, state: str, done: int, total: int | None, time: str, metrics: Mapping[str, float]
    ) -> None:
        headline = self._headlines.get(stage, DEFAULT_HEADLINE)
        metric = next((f"{name} {metrics[name]:.4g}" for name in headline if name in metrics), "")
        self._bars.update(
            self._tasks[stage],
            state=state,
            completed=done,
            total=total,
            count=f"{done}/{total}",
            time=time,
            metric=metric,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        with self._lock:
            training, tasks = self._training, self._bars.tasks
            if training is not None:
                steps = training.steps
                left = f"{steps.left} left" if steps.left else ""
                self._show(steps.what, RUNNING, steps.done, steps.total, left, {})
                # one line for the title, and one that the cursor stands on
                tasks = _fewer(tasks, console.height - 2 - LINES_BELOW)
            title = self._title(len(self._tasks) - len(tasks), width)
            parts = [title, self._table(tasks, width), *(training.lines(width) if training else ())]
        yield from (Constrain(part, width) for part in parts)

    def _title(self, hidden: int, width: int) -> Text:
        states = [task.fields["state"] for task in self._bars.tasks]
        parts = [f"{states.count(FINISHED)} of {len(states)} stages finished"] if len(states) > 1 else []
        parts += [duration(self._clock() - self._began), *([f"{hidden} not shown"] if hidden else [])]
        text = Text(f"{self.name}  ", style="bold", no_wrap=True, overflow="ellipsis")
        return text.append(fitting(parts, width - text.cell_len), style="not bold dim")

    def _table(self, tasks: Sequence[Task], width: int) -> Table:
        """A line for each stage; its bar has the room that is left; its inputs and last metric stand where they fit."""

        def longest(template: str) -> int:
            return max(Text.from_markup(template.format(task=task)).cell_len for task in tasks)

        name, figures = NAME, [COUNT, TIME]
        for_name = width - sum(longest(one) + 1 for one in figures)
        room = for_name - longest(name) - SHORTEST_BAR - 1
        if room > longest(METRIC):
            figures.append(METRIC)
            room -= longest(METRIC) + 1
        if room >= longest(NAME + INPUTS) - longest(NAME):
            name += INPUTS
        bar = BarColumn(None, complete_style="cyan", finished_style="green", table_column=Column(ratio=1))
        self._bars.columns = (
            TextColumn(name, table_column=Column(no_wrap=True, max_width=max(1, for_name))),
            *([bar] if room >= 0 else []),
            *(TextColumn(one, table_column=Column(no_wrap=True)) for one in figures),
        )
        return self._bars.make_tasks_table(tasks)


def _fewer(tasks: Sequence[Task], room: int) -> list[Task]:
    """Without the first finished and the last waiting ones, where there is no room for all."""
    finished = [task for task in tasks if task.fields["state"] == FINISHED]
    waiting = [task for task in tasks if task.fields["state"] == WAITING]
    hidden = [*finished, *reversed(waiting)][: max(0, len(tasks) - room)]
    return [task for task in tasks if task not in hidden]
