"""Names of lines and points, written beside them instead of in a legend: moved apart until none covers another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aligndistil.report.palette import GROUND, Look
from aligndistil.report.smoothing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

SIZE, SMALL = 10.0, 8.5
"""Of the names, in points: usually, and in a crowd."""
CROWD = 14
"""Of more lines the names are smaller."""
SHORT = 0.25
"""Share of the axes. Where a line ends so far from their right side, a line on to its name would pass for its own."""
LEADING = 1.35
"""From one baseline to the next, in sizes."""
MARGIN, SAMPLE = 16.0, 26.0
"""Points between the axes and the column of names, and the length of a piece of a line."""

AWAY = (7.0, 9.5, 13.0, 18.0, 25.0, 34.0, 46.0, 60.0)
DIRECTIONS = 24
"""Where a name may stand: this far from its point, in points, in this many directions."""
MARK = 5.0
"""Half a marker, with some ground around it."""
BEGINNINGS, ROUNDS = 6, 8
"""How many times the places are chosen anew, and how many times at most each name looks for a better one."""

# What a place costs, in points of distance. A name is nowhere rather than on another, and it leaves the axes or covers
# a marker only where there is no other room; the lines to the points are kept apart where that is cheap.
ON_NAME, OUTSIDE, ON_MARK = 1e5, 1e4, 2e3
TIE_ON_NAME, TIE_ON_TIE, TIE_ON_MARK = 500.0, 150.0, 60.0
NEAR_ANOTHER, ON_PATH, MOST_ON_PATHS, UPRIGHT = 8.0, 0.7, 10.0, 2.0


class End(NamedTuple):
    """Where a line ends, or a point lies, in data units, what to write there and how it is drawn."""

    label: str
    x: float
    y: float
    look: Look


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


# ---- a column beside the axes


def column_height(names: int) -> float:
    """Inches that a column of this many names takes."""
    return names * LEADING * _size(names) / 72


def _size(names: int) -> float:
    return SIZE if names <= CROWD else SMALL


def label_in_margin(axes: Axes, ends: Sequence[End]) -> list[Annotation]:
    """A column to the right of the axes, each name as near as can be to the height of its line's end.

    A thin line ties each to its end. Where such lines would hide the data, in a crowd or from far away, each name has a
    piece of its line before it instead, in the order of the ends.
    """
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    figure = _drawn(axes)
    box = axes.get_window_extent()
    at = axes.transData.transform([(end.x, end.y) for end in ends])
    wanted = at[:, 1].tolist()
    tied = len(ends) <= CROWD and at[:, 0].min() > box.x1 - SHORT * box.width
    # Half a name is above the highest baseline and half below the lowest: together a gap.
    gap = min(LEADING * _size(len(ends)) * figure.dpi / 72, box.height / len(ends))
    heights = spread(wanted, gap, box.y0 + gap / 2, box.y1 - gap / 2)
    # Inches to the right of the axes, and shares of their height.
    whole: Any = axes.transAxes
    column = blended_transform_factory(figure.dpi_scale_trans + ScaledTranslation(1, 0, whole), whole)
    left = (MARGIN + (0 if tied else SAMPLE + 8)) / 72
    made = []
    for end, height in zip(ends, [(height - box.y0) / box.height for height in heights], strict=True):
        where: dict[str, Any] = {"xytext": (left, height), "textcoords": column, "ha": "left"}
        made.append(_name(axes, end, _size(len(ends)), where, (0.0, 0.5) if tied else None))
        if not tied:
            _sample(axes, end.look, height, column)
    return made


def _sample(axes: Axes, look: Look, height: float, column: Any) -> None:
    from matplotlib.lines import Line2D

    ends = [MARGIN / 72, (MARGIN + SAMPLE) / 72]
    dot = look.dot(5.5, GROUND) | {"markevery": [1]}
    piece = Line2D(ends, [height] * 2, ls=look.dashes, lw=1.8, label="_sample", clip_on=False, **dot)
    piece.set_transform(column)
    axes.add_artist(piece)


# ---- beside the points


class _Places(NamedTuple):
    """Where one name may stand: C places, in points from the corner of the figure."""

    boxes: Array
    """(C, 4): left, bottom, right, top"""
    ties: Array
    """(C, 2, 2): from the point to the nearest of the box"""
    away: Array
    """(C,)"""


def label_beside(axes: Axes, ends: Sequence[End], paths: Sequence[Array] = (), zorder: float = 6) -> list[Annotation]:
    """Each name near its own point, tied to it where it had to move away.

    It is on no other name, on no point, and on as little as possible of the paths, (P, 2) each. The axes must have the
    room: they are not made wider for a name.
    """
    figure = _drawn(axes)
    point = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents) / point
    marks = axes.transData.transform([(end.x, end.y) for end in ends]) / point
    light = axes.transData.transform(np.concatenate(paths)) / point if paths else np.empty((0, 2))
    places = [_places(mark, _extent(axes, end) / point) for mark, end in zip(marks, ends, strict=True)]
    alone = [_cost(some, np.delete(marks, i, axis=0), marks[i], frame, light) for i, some in enumerate(places)]
    made = []
    for end, mark, (box, tie) in zip(ends, marks, _chosen(places, alone), strict=True):
        middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        where = {"xytext": tuple(middle - mark), "textcoords": "offset points", "ha": "center"}
        moved = _length(tie[1] - tie[0]) > AWAY[1]
        made.append(_name(axes, end, SIZE, where, tuple((tie[1] - box[:2]) / size) if moved else None, zorder))
    return made


def _chosen(places: Sequence[_Places], alone: Sequence[Array]) -> list[tuple[Array, Array]]:
    """A place for each name: in turns the best beside the others, until none moves, from several beginnings."""
    names = range(len(places))

    def cost(i: int, chosen: Mapping[int, int]) -> Array:
        others = [(places[j].boxes[at], places[j].ties[at]) for j, at in chosen.items() if j != i]
        return alone[i] + _clashes(places[i], *map(np.array, zip(*others, strict=True))) if others else alone[i]

    found: list[tuple[float, dict[int, int]]] = []
    for first in range(min(BEGINNINGS, len(places))):
        # Whoever comes first takes the best place: another is first each time.
        order = [(first * len(places) // BEGINNINGS + i) % len(places) for i in names]
        chosen: dict[int, int] = {}
        for _ in range(ROUNDS):
            before = dict(chosen)
            for i in order:
                chosen[i] = int(np.argmin(cost(i, chosen)))
            if chosen == before:
                break
        found.append((sum(float(cost(i, chosen)[chosen[i]]) for i in names), chosen))
    best = min(found, key=lambda one: one[0])[1] if found else {}
    return [(places[i].boxes[best[i]], places[i].ties[best[i]]) for i in names]


def _places(mark: Array, size: Array) -> _Places:
    angles = np.linspace(0, 2 * np.pi, DIRECTIONS, endpoint=False)
    toward = np.tile(np.stack([np.cos(angles), np.sin(angles)], axis=1), (len(AWAY), 1))
    away = np.repeat(AWAY, DIRECTIONS)
    nearest = mark + away[:, None] * toward
    # The box touches that point with a side, or in between with a corner.
    low = nearest + (np.clip(1.4 * toward, -1, 1) - 1) / 2 * size
    boxes = np.concatenate([low, low + size], axis=1)
    ties = np.stack([np.broadcast_to(mark, low.shape), np.clip(mark, low, low + size)], axis=1)
    return _Places(boxes, ties, away + UPRIGHT * np.abs(toward[:, 1]))


def _cost(places: _Places, others: Array, own: Array, frame: Array, light: Array) -> Array:
    """What each place costs, whatever the other names do."""
    boxes, ties = places.boxes, places.ties
    outside = (boxes[:, :2] < frame[:2]).any(axis=1) | (boxes[:, 2:] > frame[2:]).any(axis=1)
    covered = _inside(np.vstack([others, own]), boxes[:, None], MARK).sum(axis=1)
    on_paths = np.minimum(ON_PATH * _inside(light, boxes[:, None], 0).sum(axis=1), MOST_ON_PATHS)
    to_another = np.clip(others, boxes[:, None, :2], boxes[:, None, 2:]) - others
    nearer = _length(to_another) < _length(ties[:, 1] - ties[:, 0])[:, None] + 2
    crossed = (_length(_along(ties)[:, :, None] - others) < MARK).any(axis=1)
    crowded = NEAR_ANOTHER * nearer.sum(axis=1) + TIE_ON_MARK * crossed.sum(axis=1)
    return np.asarray(places.away + on_paths + crowded + OUTSIDE * outside + ON_MARK * covered)


def _length(vectors: Array) -> Array:
    return np.asarray(np.sqrt((vectors**2).sum(axis=-1)))


def _clashes(places: _Places, boxes: Array, ties: Array) -> Array:
    """What each place costs beside N other names in their boxes, (N, 4), tied to their points, (N, 2, 2)."""
    mine, tie = places.boxes[:, None], places.ties[:, None]
    on_name = ((mine[..., :2] < boxes[:, 2:] + 1) & (mine[..., 2:] > boxes[:, :2] - 1)).all(axis=2)
    theirs = _inside(_along(ties), mine[:, :, None], 1).any(axis=2)
    ours = _inside(_along(tie), boxes[:, None], 1).any(axis=2)
    crossing = _parted(tie, ties) & _parted(ties, tie)
    cost = ON_NAME * on_name + TIE_ON_NAME * (theirs.astype(float) + ours) + TIE_ON_TIE * crossing
    return np.asarray(cost.sum(axis=1))


def _along(ties: Array) -> Array:
    """(..., 9, 2) points of lines (..., 2, 2)."""
    steps = np.linspace(0, 1, 9)[:, None]
    return np.asarray(ties[..., :1, :] * (1 - steps) + ties[..., 1:, :] * steps)


def _parted(ends: Array, line: Array) -> Any:
    """Whether the two ends lie on different sides of the line, both (..., 2, 2)."""
    along, (first, last) = line[..., 1, :] - line[..., 0, :], (ends[..., i, :] - line[..., 0, :] for i in (0, 1))
    sides = [along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0] for to in (first, last)]
    return sides[0] * sides[1] < 0


def _inside(points: Array, boxes: Array, around: float) -> Any:
    """Which points (..., 2) are in which boxes (..., 4), or so near to them."""
    return ((points > boxes[..., :2] - around) & (points < boxes[..., 2:] + around)).all(axis=-1)


# ---- matplotlib


def _drawn(axes: Axes) -> Figure:
    """The figure, after its layout has settled."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def _extent(axes: Axes, end: End) -> Array:
    """Width and height of its name, in pixels."""
    text = axes.text(0, 0, end.label, fontsize=SIZE, parse_math=False)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width, extent.height])


def _name(
    axes: Axes, end: End, size: float, where: dict[str, Any], tied: tuple[float, float] | None, zorder: float = 6
) -> Annotation:
    """`tied`: at which share of its width and height a thin line to the end begins."""
    tie = {"arrowstyle": "-", "color": end.look.text, "lw": 0.7, "alpha": 0.7, "shrinkA": 1.0, "shrinkB": 3.5}
    return axes.annotate(
        end.label,
        xy=(end.x, end.y),
        color=end.look.text,
        fontsize=size,
        va="center",
        annotation_clip=False,
        arrowprops=None if tied is None else tie | {"relpos": tied},
        parse_math=False,
        zorder=zorder,
        bbox={"facecolor": GROUND, "alpha": 0.75, "lw": 0, "pad": 0.8},
        **where,
    )
