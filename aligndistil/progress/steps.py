"""A bar, or plain lines, for work that is counted in steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Self

import rich
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aligndistil.errors import printable

PLAIN_EVERY = 15.0
REDRAWS = 2
"""A second, on a terminal."""
SHORTEST_BAR = 4

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


def bar(done: int, total: int | None, width: int | None = None) -> ProgressBar:
    """As wide as there is room, without a width; without a total it only moves."""
    return ProgressBar(total, done, width, complete_style="cyan", finished_style="green")


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
    """Progress of `total` steps of `what`, which may be set later. A context manager; ranks above 0 show nothing.

    A bar is drawn while there is something to count, from the first step where the total is not known before, and only
    a full one stays on the terminal.
    """

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
        self._values = NOTHING
        self._shown = rank == 0 and not hidden
        self._console = console or rich.get_console()
        self._live = Live(self, console=self._console, refresh_per_second=REDRAWS)
        self._clock = clock

    def __enter__(self) -> Self:
        self._began = self._next_line = self._clock()
        if self.total is not None and self.done < self.total:
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is None and self.total is None:  # then what was done is all there was
            self.total = self.done
        self._live.transient = self.total is None or self.done < self.total
        self._live.stop()

    def advance(self, steps: int = 1, values: Mapping[str, str] = NOTHING) -> None:
        """`steps` more are done; `values` by label stand beside the bar."""
        self.done += steps
        self._values = values
        self._draw()
        plain = self._shown and not self._live.is_started
        if plain and (self._clock() >= self._next_line or self.done == self.total):
            self._next_line = self._clock() + PLAIN_EVERY
            line = f"{self.what}: {', '.join([*self._parts, f'elapsed {duration(self.seconds)}'])}"
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._shown and is_live(self._console):
            self._live.start(refresh=True)

    @property
    def _parts(self) -> list[str]:
        left = [f"left {self.left}"] if self.left else []
        return [self.count, *left, *(printable(f"{label} {value}") for label, value in self._values.items())]

    @property
    def count(self) -> str:
        """12/94 rows; 12 rows without a total."""
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}".rstrip()

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line: the count is always there, the bar where there is room for both, and what else fits whole."""
        width = options.max_width
        name = Text(printable(self.what), "bold")
        name.truncate(max(1, width - cell_len(self.count) - 1), overflow="ellipsis")
        elapsed = Text(f"{duration(self.seconds)} " if width >= 80 else "", "yellow")
        bar_width = max(SHORTEST_BAR, width // 8)
        room = width - name.cell_len - 1
        line = Table.grid(padding=(0, 1, 0, 0))
        if beside := fitting(self._parts, room - bar_width - 1 - elapsed.cell_len):
            line.add_row(name, bar(self.done, self.total, bar_width), elapsed.append(beside, "default"))
        else:
            line.add_row(name, Text(fitting(self._parts, room)))
        yield line
