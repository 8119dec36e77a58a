"""One stage's training: a bar, the curve of its main metric, and its last values."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aligndistil.progress.curve import Curve
from aligndistil.progress.graph import StageLine
from aligndistil.progress.steps import duration

MAIN = ("reward/token_mean", "rewards/margins", "loss")
"""The metric that is drawn: the first of these that the stage has."""
LAST = (
    "gold_reward",
    "loss",
    "rewards/accuracies",
    "accuracy",
    "kl/policy_teacher",
    "completions/mean_length",
    "grad_norm",
)
"""Metrics whose last values stand below the curve, as many as there is room for."""
CURVE_HEIGHT = 4
PANEL_HEIGHT = CURVE_HEIGHT + 4
LABELS = 9
"""Characters left of the curve."""
SPEEDS = 10
"""Steps over which tokens/s is averaged."""


def main_metric(metrics: Mapping[str, Any]) -> str | None:
    """The name of the metric to draw; None where there is none of `MAIN`."""
    return next((name for name in MAIN if name in metrics), None)


class Training:
    """The figures of a training that goes on; they are noted in the stage's line too."""

    def __init__(self, line: StageLine, start: int, now: float, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """`history` is lines of metrics.jsonl; those of the split `train` up to step `start` count."""
        self.line, self.start, self.began = line, start, now
        self.curve = Curve()
        self.last: Mapping[str, float] = {}
        self._main: str | None = None
        self._speeds: deque[float] = deque(maxlen=SPEEDS)
        for old in history:
            if old["split"] == "train" and old["step"] <= start:
                self._draw(old["step"], old)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.line.steps, self.last = step, dict(metrics)
        if "perf/tokens_per_second" in metrics:
            self._speeds.append(metrics["perf/tokens_per_second"])
        self._draw(step, metrics)

    @property
    def speed(self) -> float | None:
        """Tokens a second, lately."""
        return sum(self._speeds) / len(self._speeds) if self._speeds else None

    def left(self, now: float) -> float | None:
        """Seconds, if it goes on as it has since it began here."""
        done, total = self.line.steps or 0, self.line.total or 0
        fresh = done - self.start
        return (now - self.began) / fresh * (total - done) if fresh > 0 and done < total else None

    def _draw(self, step: int, metrics: Mapping[str, Any]) -> None:
        name = main_metric(metrics)
        if name is None:
            return
        if self._main is None or MAIN.index(name) < MAIN.index(self._main):
            self._main, self.curve = name, Curve()
        if name == self._main:
            self.line.metric = (name, metrics[name])
            self.curve.add(step, metrics[name])


def panel(training: Training, now: float, width: int) -> Group:
    """`PANEL_HEIGHT` lines, no wider than `width`."""
    return Group(Text(), _bar(training, now), *_curve(training, width), _values(training, width))


def _bar(training: Training, now: float) -> Table:
    done, total = training.line.steps or 0, training.line.total or 0
    left, speed = training.left(now), training.speed
    parts = [f"{done}/{total}", f"{done / total:.0%}" if total else ""]
    parts += [f"{speed:,.0f} tok/s"] if speed is not None else []
    parts += [f"{duration(left)} left"] if left is not None else []
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1)
    for _ in parts:
        table.add_column(no_wrap=True)
    table.add_row(ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green"), *parts)
    return table


def _curve(training: Training, width: int) -> list[Text]:
    drawn = training.curve.draw(max(8, width - LABELS - 1), CURVE_HEIGHT)
    if drawn is None or training.line.metric is None or training.curve.steps is None:
        return [Text("the first step is on its way", style="dim"), *[Text() for _ in range(CURVE_HEIGHT)]]
    lines, low, high = drawn
    name, value = training.line.metric
    first, last = training.curve.steps
    labels = [f"{high:.3g}", *[""] * (CURVE_HEIGHT - 2), f"{low:.3g}" if high > low else ""]
    head = Text(f"{'':{LABELS}} ", no_wrap=True, overflow="ellipsis").append(name).append(f" {value:.4g}", style="bold")
    head.append(f"  steps {first:.0f} to {last:.0f}", style="dim")
    rows = [
        Text(f"{label:>{LABELS}} ", style="dim", no_wrap=True).append(line, style="not dim cyan")
        for label, line in zip(labels, lines, strict=True)
    ]
    return [head, *rows]


def _values(training: Training, width: int) -> Text:
    """As many whole ones as fit."""
    main = training.line.metric[0] if training.line.metric else None
    text = Text(no_wrap=True, overflow="crop")
    for name in LAST:
        if name in training.last and name != main:
            value = f"{training.last[name]:.4g}"
            if len(text) + len(name) + 1 + len(value) > width:
                break
            text.append(f"{name} ", style="dim").append(f"{value}  ")
    return text
