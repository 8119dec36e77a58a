"""A bar, or plain lines, for work that is counted in steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Self

import rich
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

PLAIN_EVERY = 15.0
REDRAWS = 2
"""A second, on a terminal."""

NOTHING: Mapping[str, str] = MappingProxyType({})
Clock = Callable[[], float]


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def is_live(console: Console) -> bool:
    """Whether something may move on this console: a terminal that can, without NO_COLOR, whose characters are UTF-8."""
    return console.is_interactive and not console.no_color and not console.options.ascii_only


def fitting(parts: Iterable[str], width: int) -> str:
    """As many of the first parts as fit whole, with commas between them."""
    text = ""
    for part in parts:
        longer = f"{text}, {part}" if text else part
        if cell_len(longer) > width:
            break
        text = longer
    return text


class Steps:
    """Progress of `total` steps of `what`, which may be set later. A context manager; ranks above 0 show nothing."""

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        start: int = 0,
        unit: str = "",
        rank: int = 0,
        hidden: bool = False,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`start` steps were done before, by a run that is resumed; time left is judged by the others.

        `hidden` steps are only counted: something else shows them.
        """
        self.what, self.total, self.unit = what, total, unit
        self.done = self.start = start
        self._shown = rank == 0 and not hidden
        self._console = console or rich.get_console()
        self._clock = clock
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._next_line = self._began
        if self._shown and is_live(self._console):
            width = self._console.width
            bar_width = max(4, width // 8)
            elapsed = [TimeElapsedColumn()] if width >= 80 else []
            self._room = width - cell_len(self.what) - 1 - bar_width - 1 - 8 * len(elapsed)
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width, complete_style="cyan", finished_style="green"),
                *elapsed,
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
                console=self._console,
                expand=True,
                refresh_per_second=REDRAWS,
                get_time=self._clock,
            )
            text = fitting([self.count], self._room)
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, text=text)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._bar is not None:
            if kind is None and self.total is None:  # then what was done is all there was
                self._bar.update(self._task, total=self.done, completed=self.done)
            self._bar.stop()

    def advance(self, steps: int = 1, values: Mapping[str, str] = NOTHING) -> None:
        """`steps` more are done; `values` by label stand beside the bar."""
        self.done += steps
        parts = [self.count, *([f"left {self.left}"] if self.left else []), *(f"{k} {v}" for k, v in values.items())]
        if self._bar is not None:
            text = fitting(parts, self._room)
            self._bar.update(self._task, total=self.total, completed=self.done, text=text)
        elif self._shown and (self._clock() >= self._next_line or self.done == self.total):
            self._next_line = self._clock() + PLAIN_EVERY
            line = f"{self.what}: {', '.join([*parts, f'elapsed {duration(self.seconds)}'])}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def count(self) -> str:
        """12/94 rows; 12 rows without a total; empty when there is nothing to say yet."""
        if self.total is None:
            return f"{self.done} {self.unit}".rstrip() if self.done else ""
        return f"{self.done}/{self.total} {self.unit}".rstrip()

    @property
    def left(self) -> str:
        """The time that the other steps take, if it goes on as it has since it began here; empty when unknown."""
        fresh = self.done - self.start
        if fresh == 0 or self.total is None or self.done >= self.total:
            return ""
        return duration(self.seconds / fresh * (self.total - self.done))

    @property
    def seconds(self) -> float:
        """Since it began here."""
        return self._clock() - self._began
