"""A bar, or plain lines, for work that is counted in steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Self, TypeVar

import rich
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

PLAIN_EVERY = 15.0
REFRESHES = 4
"""A second, on a terminal."""

NOTHING: Mapping[str, str] = MappingProxyType({})
Clock = Callable[[], float]
T = TypeVar("T")


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def is_live(console: Console) -> bool:
    """Whether something may move on this console: a terminal that can, without NO_COLOR, whose characters are UTF-8."""
    return console.is_interactive and not console.no_color and not console.options.ascii_only


class Steps:
    """Progress of `total` steps of `what`. A context manager; ranks above 0 show nothing."""

    def __init__(
        self,
        what: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "",
        rank: int = 0,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`start` steps were done before, by a run that is resumed; time left is judged by the others."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self.start = start
        self._shown = rank == 0
        self._console = console or rich.get_console()
        self._clock = clock
        self._live: Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._last_line = -PLAIN_EVERY + self._began
        if self._shown and is_live(self._console):
            self._live = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=max(4, min(30, self._console.width - 76))),
                TimeElapsedColumn(),
                # Takes the space that is left: where that is little, the end of the line is cut, not the bar.
                TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
                console=self._console,
                expand=True,
                refresh_per_second=REFRESHES,
            )
            self._task = self._live.add_task(self.what, total=self.total, completed=self.done, text=self._markup({}))
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, steps: int = 1, values: Mapping[str, str] = NOTHING) -> None:
        """`steps` more are done; `values` by label stand beside the bar."""
        self.done += steps
        if self._live is not None:
            self._live.update(self._task, completed=self.done, text=self._markup(values))
        elif self._shown and self._is_due():
            elapsed = {"elapsed": duration(self._clock() - self._began)}
            parts = [f"{label} {value}" for label, value in (self._left() | dict(values) | elapsed).items()]
            line = f"{self.what}: {', '.join([self._count(), *parts])}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _is_due(self) -> bool:
        now = self._clock()
        if now - self._last_line < PLAIN_EVERY and self.done < self.total:
            return False
        self._last_line = now
        return True

    def _markup(self, values: Mapping[str, str]) -> str:
        return " ".join([self._count(), *(f"[dim]{k}[/dim] {v}" for k, v in (self._left() | dict(values)).items())])

    def _count(self) -> str:
        return f"{self.done}/{self.total} {self.unit}".rstrip()

    def _left(self) -> dict[str, str]:
        fresh = self.done - self.start
        if fresh == 0 or self.done >= self.total:
            return {}
        return {"left": duration((self._clock() - self._began) / fresh * (self.total - self.done))}


def track(items: Iterable[T], what: str, total: int, *, unit: str = "", rank: int = 0) -> Iterator[T]:
    """The same items, with a progress display."""
    with Steps(what, total, unit=unit, rank=rank) as steps:
        for item in items:
            yield item
            steps.advance()
