"""The stages of a run, each below what it needs: what is finished, what runs, what waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from rich.table import Table
from rich.text import Text

from aligndistil.progress.steps import duration


class State(Enum):
    """Of a stage: its mark, and the style of the mark."""

    WAITING = ("○", "dim")
    RUNNING = ("▶", "cyan")
    FINISHED = ("✓", "green")
    EARLIER = ("✓", "dim green")
    STOPPED = ("■", "yellow")

    @property
    def is_finished(self) -> bool:
        return self in (State.FINISHED, State.EARLIER)


@dataclass(slots=True)
class StageLine:
    """One stage, as it stands."""

    inputs: Sequence[str]
    depth: int
    """Stages on the longest way to it."""
    state: State = State.WAITING
    began: float = 0.0
    seconds: float | None = None
    """That it took; None until it is finished."""
    steps: int | None = None
    total: int | None = None
    metric: tuple[str, float] | None = None
    """Name and last value of the main metric."""

    @staticmethod
    def of_graph(stages: Mapping[str, Sequence[str]]) -> dict[str, StageLine]:
        """`stages` with their inputs, in an order in which inputs come first; inputs from elsewhere are left out."""
        lines: dict[str, StageLine] = {}
        for name, inputs in stages.items():
            known = [i for i in inputs if i in lines]
            lines[name] = StageLine(known, 1 + max((lines[i].depth for i in known), default=-1))
        return lines

    def start(self, now: float) -> None:
        self.state, self.began = State.RUNNING, now

    def finish(self, now: float, steps: int | None, seconds: float | None) -> None:
        ours = now - self.began if self.state is State.RUNNING else None
        self.state = State.EARLIER if self.state is State.WAITING else State.FINISHED
        self.seconds = ours if seconds is None else seconds
        self.steps = self.steps if steps is None else steps


def title(name: str, lines: Collection[StageLine], seconds: float) -> Text:
    """The run, how many of its stages are finished, and how long it has been going."""
    states = [line.state for line in lines]
    if len(states) == 1:
        stages = "finished" if states[0].is_finished else "stopped" if states[0] is State.STOPPED else "training"
    else:
        stages = f"{sum(state.is_finished for state in states)} of {len(states)} stages finished"
    text = Text(name, style="bold", no_wrap=True, overflow="ellipsis")
    return text.append(f"  {stages}, {duration(seconds)}", style="not bold dim")


def graph(lines: Mapping[str, StageLine], now: float, width: int, room: int | None = None) -> Table:
    """A line for each stage; where there is only `room` for fewer, finished and waiting ones are counted instead."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    if width >= 60:
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=36)
    for name in _shown(lines, room):
        cells = _counted(name, lines) if isinstance(name, State) else _cells(name, lines[name], now)
        table.add_row(*cells[: len(table.columns)])
    return table


def _shown(lines: Mapping[str, StageLine], room: int | None) -> list[str | State]:
    """Names of stages in their order; a state stands for all stages in it."""
    if room is None or len(lines) <= room:
        return list(lines)
    finished = [name for name, line in lines.items() if line.state.is_finished]
    running = [name for name, line in lines.items() if line.state is State.RUNNING]
    waiting = [name for name, line in lines.items() if line.state is State.WAITING]
    shown: list[str | State] = [State.FINISHED] if finished else []
    left = max(0, room - len(shown) - len(running) - 1)
    return [*shown, *running, *waiting[:left], *([State.WAITING] if len(waiting) > left else [])]


def _counted(state: State, lines: Mapping[str, StageLine]) -> list[Text]:
    if state is State.FINISHED:
        what = f"{sum(line.state.is_finished for line in lines.values())} finished"
    else:
        what = f"{sum(line.state is state for line in lines.values())} waiting in all"
    return [_mark(state).append(what, style="dim"), Text(), Text(), Text()]


def _cells(name: str, line: StageLine, now: float) -> list[Text]:
    text = _mark(line.state)
    text.append("  " * (line.depth - 1) + "└ " if line.depth else "", style="dim")
    text.append(name, style="bold" if line.state is State.RUNNING else "dim" if line.state is State.WAITING else "none")
    if line.inputs:
        text.append(f" ← {', '.join(line.inputs)}", style="dim")
    if line.state is State.EARLIER:
        text.append(" (earlier)", style="dim")
    return [text, Text(_steps(line)), Text(_time(line, now)), _metric(line)]


def _mark(state: State) -> Text:
    mark, style = state.value
    return Text().append(f"{mark} ", style=style)


def _steps(line: StageLine) -> str:
    if line.steps is None or line.state is State.RUNNING:  # then it is in the panel
        return ""
    return f"{line.steps} steps" if line.state.is_finished else f"{line.steps}/{line.total}"


def _time(line: StageLine, now: float) -> str:
    if line.state is State.RUNNING:
        return duration(now - line.began)
    return "" if line.seconds is None else duration(line.seconds)


def _metric(line: StageLine) -> Text:
    if line.metric is None or line.state is State.RUNNING:
        return Text()
    name, value = line.metric
    return Text().append(f"{name} ", style="dim").append(f"{value:.4g}")
