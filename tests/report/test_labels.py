"""Names beside points: where they stand, read from the figure object."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from aligndistil.report.labels import CROWD, SMALL, End, column_height, label_beside, spread
from aligndistil.report.palette import looks
from aligndistil.report.smoothing import Array


@pytest.fixture
def axes() -> Axes:
    axes: Axes = Figure(figsize=(6, 4)).subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    return axes


def ends_at(points: list[tuple[float, float]]) -> list[End]:
    return [End(f"method_{i}", x, y, look) for i, ((x, y), look) in enumerate(zip(points, looks(99), strict=False))]


def named(axes: Axes, ends: list[End], paths: Sequence[Array] = ()) -> list[Annotation]:
    texts = label_beside(axes, ends, paths)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return texts


def covered(axes: Axes, texts: list[Annotation], ends: list[End]) -> list[tuple[str, str]]:
    """Pairs of a name and what it lies on: another name, or a point's marker, of which a half is four pixels."""
    boxes = {text.get_text(): Text.get_window_extent(text) for text in texts}
    found = [(one, other) for one, other in combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]
    at = {end.label: axes.transData.transform((end.x, end.y)) for end in ends}
    return found + [
        (name, f"point {label}") for name, box in boxes.items() for label in at if box.padded(4).contains(*at[label])
    ]


def test_in_a_cluster_no_name_is_on_a_point_or_on_another_name_and_all_are_within_the_axes(axes):
    random = np.random.default_rng(0)
    ends = ends_at([(5 + x, 5 + y) for x, y in random.uniform(-0.8, 0.8, size=(15, 2))])
    texts = named(axes, ends)
    assert [text.get_text() for text in texts] == [end.label for end in ends]
    assert covered(axes, texts, ends) == []
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for text in texts for corner in Text.get_window_extent(text).corners())


def test_a_name_is_rather_on_paths_than_on_a_point(axes):
    grid = np.stack(np.meshgrid(np.linspace(0, 10, 200), np.linspace(0, 10, 200)), axis=-1).reshape(-1, 2)
    # Only right of the first point is there room for a name, and the second point in the middle of it.
    paths = grid[(grid[:, 0] > 2.1) | (abs(grid[:, 1] - 5) > 0.36)]
    ends = ends_at([(0.2, 5), (1.1, 5)])
    assert covered(axes, named(axes, ends, [paths]), ends) == []


def test_a_name_alone_stands_right_beside_its_point_and_one_that_had_to_move_is_tied_to_it(axes):
    (alone,) = named(axes, ends_at([(5, 5)]))
    box, point = Text.get_window_extent(alone), axes.transData.transform((5, 5))
    assert 0 < box.x0 - point[0] < 12
    assert box.y0 < point[1] < box.y1
    assert alone.arrow_patch is None
    crowded = named(axes, ends_at([(5 + 0.05 * i, 5) for i in range(8)]))
    assert any(text.arrow_patch is not None for text in crowded)


def test_a_name_keeps_within_the_axes_at_their_corner(axes):
    (text,) = named(axes, ends_at([(9.95, 9.95)]))
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for corner in Text.get_window_extent(text).corners())


def test_a_name_keeps_off_the_paths(axes):
    to_the_right = np.stack([np.linspace(5, 10, 200), np.full(200, 5.0)], axis=1)
    (text,) = named(axes, ends_at([(5, 5)]), [to_the_right])
    box, (x, y) = Text.get_window_extent(text), axes.transData.transform((5, 5))
    assert box.x1 < x or not box.y0 < y < box.y1


def test_without_points_there_are_no_names(axes):
    assert named(axes, ends_at([])) == []


def test_positions_fit_where_there_is_just_the_room():
    assert spread([0.0] * 5, 2.0, 0.0, 8.0) == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_crowd_has_smaller_names_so_that_its_column_is_hardly_longer():
    assert column_height(CROWD + 1) == pytest.approx((CROWD + 1) * 1.35 * SMALL / 72)
    assert column_height(CROWD + 1) < column_height(CROWD)
