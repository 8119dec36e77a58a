"""Names at the ends of lines, instead of a legend: moved apart until none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from aligndistil.report.curves import Array
from aligndistil.report.palette import GROUND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox, Transform

SIZE = 10.0
GAP = 1.35 * SIZE
"""Points from one baseline to the next."""
MARGIN = 16.0
"""Points between the axes and the column of names."""
ROWS = 8
"""How far a name may move from its end, in lines of text."""


class End(NamedTuple):
    """Where a line ends, in data units, and what to write there."""

    label: str
    x: float
    y: float
    colour: str


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, within low and high where they fit, with the least sum of squared moves.

    Isotonic regression of the positions less i * gap, by pooling adjacent violators.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        mean, size = wanted[i] - place * gap, 1
        while pools and pools[-1][0] >= mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    top = high - (len(wanted) - 1) * gap
    means = [max(min(mean, top), min(low, top)) for mean, size in pools for _ in range(size)]
    moved = [0.0] * len(wanted)
    for place, (i, mean) in enumerate(zip(order, means, strict=True)):
        moved[i] = mean + place * gap
    return moved


def label_in_margin(axes: Axes, ends: Sequence[End]) -> list[Annotation]:
    """A column to the right of the axes, each name at the height of its line's end, tied to it by a thin line."""
    from matplotlib.transforms import ScaledTranslation

    figure = _drawn(axes)
    box = axes.get_window_extent()
    wanted = [float(axes.transData.transform((end.x, end.y))[1]) for end in ends]
    heights = spread(wanted, GAP * figure.dpi / 72, box.y0, box.y1)
    column = axes.transAxes + ScaledTranslation(MARGIN / 72, 0, figure.dpi_scale_trans)
    return [
        _name(axes, end, (1.0, (height - box.y0) / box.height), column, "left")
        for end, height in zip(ends, heights, strict=True)
    ]


def label_beside(axes: Axes, ends: Sequence[End], paths: Sequence[Array]) -> list[Annotation]:
    """Each name near its own end, where it covers no other name and as little as possible of the paths, (P, 2) each.

    The axes must have the room: they are not made wider for a name.
    """
    figure = _drawn(axes)
    point, frame = figure.dpi / 72, axes.get_window_extent()
    marks = axes.transData.transform(np.concatenate([*paths, [(end.x, end.y) for end in ends]]))
    taken: list[Bbox] = []
    made = []
    for end in ends:
        x, y = axes.transData.transform((end.x, end.y))
        width, height = _size(axes, end)
        options = [
            (side, row, _beside(x, y + row * GAP * point, side * MARGIN * point / 2, width, height))
            for row in sorted(range(-ROWS, ROWS + 1), key=abs)
            for side in (1, -1)
        ]
        side, row, box = min(options, key=lambda option: _cost(option[1], option[2], frame, taken, marks))
        taken.append(box)
        made.append(_name(axes, end, (side * MARGIN / 2, row * GAP), "offset points", "left" if side > 0 else "right"))
    return made


def _drawn(axes: Axes) -> Figure:
    """The figure, after its layout has settled."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def _size(axes: Axes, end: End) -> tuple[float, float]:
    text = axes.text(0, 0, end.label, fontsize=SIZE, parse_math=False)
    extent = text.get_window_extent()
    text.remove()
    return extent.width, extent.height


def _beside(x: float, middle: float, away: float, width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    left = x + away if away > 0 else x + away - width
    return Bbox.from_bounds(left, middle - height / 2, width, height)


def _cost(row: int, box: Bbox, frame: Bbox, taken: Sequence[Bbox], marks: Array) -> float:
    """Covering a name or leaving the frame is out of the question; of the rest, the nearest that covers little."""
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    clashes = sum(box.overlaps(other) for other in taken)
    covered = int(((marks >= box.min) & (marks <= box.max)).all(axis=1).sum())
    return float(1e6 * clashes + 1e4 * outside + min(covered, 10) + abs(row))


def _name(
    axes: Axes, end: End, at: tuple[float, float], coordinates: str | Transform, side: Literal["left", "right"]
) -> Annotation:
    tie = {"arrowstyle": "-", "color": end.colour, "lw": 0.7, "alpha": 0.7, "shrinkA": 1.0, "shrinkB": 3.5}
    return axes.annotate(
        end.label,
        xy=(end.x, end.y),
        xytext=at,
        textcoords=coordinates,
        color=end.colour,
        fontsize=SIZE,
        va="center",
        ha=side,
        annotation_clip=False,
        arrowprops=tie | {"relpos": (0.0 if side == "left" else 1.0, 0.5)},
        parse_math=False,
        zorder=6,
        bbox={"facecolor": GROUND, "alpha": 0.75, "lw": 0, "pad": 0.8},
    )
