"""A plan as tables of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from aligndistil.commands.estimate import Cost
from aligndistil.commands.remedies import Remedy
from aligndistil.commands.standing import Standing
from aligndistil.errors import for_console
from aligndistil.recipe import CODE
from aligndistil.training.memory import Memory, Models

_UNKNOWN = "?"
_MARKS = {"yes": "[green]yes[/]", "tight": "[yellow]tight[/]", "no": "[red]no[/]", None: ""}


@dataclass(frozen=True, slots=True)
class Planned:
    """One stage, as far as it is known without training it."""

    name: str
    objective: str
    standing: Standing
    taken: Cost | None
    """None where the data are on the Hub, which cannot be reached."""
    models: Models | None
    """None where a configuration is."""
    memory: Memory | None
    fits: str | None
    """`yes`, `tight` or `no`; None where no card is known."""
    hours: float | None
    remedies: list[Remedy] = field(default_factory=list)
    """Where it does not fit."""


class Column(NamedTuple):
    """Cells of all stages under one heading."""

    head: str
    cells: list[str]
    words: bool = False
    rank: int = 0
    """Where there is no room, columns of a higher rank go first."""


def stage_tables(stages: Sequence[Planned], width: int | None = None) -> Iterator[Table]:
    """One table of all stages; where the terminal has no room for it, one of what and one of memory."""
    room = width or Console().width
    names = Column("stage", [f"[bold]{for_console(stage.name)}[/]" for stage in stages], words=True)
    work, parts = _work(stages), _parts(stages)
    end = [column for column in work if column.head in ("fits", "hours")]
    start = [column for column in work if column not in end]
    for most in (4, 3):  # without the examples, which the lines on the data give too
        whole = _table([names, *(column for column in start if column.rank <= most), *parts, *end])
        if _wide(whole) <= room:
            yield whole
            return
    while _wide(_table([names, *work])) > room and any(column.rank for column in work):
        work.remove(max(work, key=lambda column: column.rank))
    yield _table([names, *work])
    while _wide(_table([names, *parts])) > room and len(parts) > 1:
        del parts[-2]  # the sum stays
    yield _table([names, *parts])


def _work(stages: Sequence[Planned]) -> list[Column]:
    taken = [stage.taken for stage in stages]
    exact = ["" if one is None or one.exact else "≤ " for one in taken]
    columns = [
        Column("objective", [stage.objective for stage in stages], words=True, rank=2),
        Column("action", [_action(stage) for stage in stages], words=True, rank=1),
        Column(
            "examples",
            [_UNKNOWN if t is None else f"{mark}{t.examples:,} {t.kind}" for t, mark in zip(taken, exact, strict=True)],
            rank=4,
        ),
        Column("steps", [_UNKNOWN if one is None else f"{one.steps:,}" for one in taken]),
        Column(
            "tokens",
            [_UNKNOWN if t is None else f"{mark}{_short(t.tokens)}" for t, mark in zip(taken, exact, strict=True)],
            rank=1,
        ),
    ]
    if any(one is not None and one.sampled for one in taken):
        sampled = [f"≤ {_short(one.sampled)}" if one is not None and one.sampled else "" for one in taken]
        columns.append(Column("sampled", sampled, rank=3))
    if any(stage.fits for stage in stages):
        columns.append(Column("fits", [_MARKS[stage.fits] for stage in stages]))
    if any(stage.hours is not None for stage in stages):
        columns.append(Column("hours", ["" if stage.hours is None else _hours(stage.hours) for stage in stages]))
    return columns


PARTS: dict[str, Callable[[Memory], float]] = {
    "weights": lambda needed: needed.weights,
    "gradients,\noptimizer": lambda needed: needed.gradients + needed.optimizer + needed.buffers,
    "frozen\nmodels": lambda needed: needed.frozen,
    "acti-\nvations": lambda needed: needed.activations,
    "head": lambda needed: needed.head,
    "rollout": lambda needed: needed.rollout,
    "update": lambda needed: needed.update * needed.is_of_update,
    "GiB": lambda needed: needed.total,
}
"""What the memory of a stage is made of, by the heading of its column."""


def _parts(stages: Sequence[Planned]) -> list[Column]:
    """GiB by part; those that no stage has are left out."""
    known: list[Memory | None] = [stage.memory for stage in stages]
    columns = []
    for head, part in PARTS.items():
        values = [None if needed is None else part(needed) for needed in known]
        if head == "GiB" or any(value for value in values):
            cells = [_UNKNOWN if value is None else gib(value) if value else "" for value in values]
            columns.append(Column(head, [f"[bold]{cell}[/]" if head == "GiB" else cell for cell in cells]))
    return columns


def _action(stage: Planned) -> str:
    if stage.standing.action == "train":
        return "to train" if stage.standing.why == "to train" else "to train *"
    return {"skip": "done *", "continue": "goes on *"}[stage.standing.action]


def model_table(stages: Mapping[str, Mapping[str, tuple[str, int | None]]]) -> Table:
    """Each model once, with its size and what it is to which stage, by stage and role."""
    sizes: dict[str, int | None] = {}
    used: dict[str, dict[str, list[str]]] = {}
    for name, models in stages.items():
        for role, (path, parameters) in models.items():
            sizes.setdefault(path, parameters)  # a scalar head makes no difference
            used.setdefault(path, {}).setdefault(role.replace("_", " "), []).append(name)
    table = _empty()
    table.add_column("model")
    table.add_column("parameters", justify="right")
    table.add_column("used as")
    for path, parameters in sizes.items():
        size = "" if path.startswith(CODE) else _UNKNOWN if parameters is None else f"{parameters / 1e6:,.1f} M"
        uses = "; ".join(f"{role} of {', '.join(names)}" for role, names in used[path].items())
        table.add_row(for_console(path), size, for_console(uses))
    return table


def remedy_table(remedies: Sequence[Remedy]) -> Table:
    table = _empty()
    table.add_column("change")
    table.add_column("GiB", justify="right")
    table.add_column("fits", no_wrap=True)
    for one in remedies:
        text = for_console("\n+ ".join(one.texts))
        table.add_row(f"[bold]{text}[/]" if one.best else text, gib(one.gib), _fits(one))
    return table


def _fits(remedy: Remedy) -> str:
    return "[green]yes[/] [bold]<[/]" if remedy.best else _MARKS["yes" if remedy.fits else "no"]


def gib(value: float) -> str:
    """Three digits, or hundredths."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _short(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else "< 0.1"


def _table(columns: Sequence[Column]) -> Table:
    table = _empty()
    for column in columns:
        table.add_column(column.head, justify="left" if column.words else "right", vertical="bottom", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _empty() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _wide(table: Table) -> int:
    return Console(width=1000).measure(table).maximum
