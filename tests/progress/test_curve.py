"""The curve of the live view: what it keeps, and where its dots are."""

import math

import pytest

from aligndistil.progress.curve import BLANK, DOTS, MOST_POINTS, Curve, columns


def curve_of(*values: float) -> Curve:
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    return curve


def dots_of(lines: list[str]) -> set[tuple[int, int]]:
    """(column, row from the top) of every dot."""
    return {
        (2 * x + i, 4 * y + j)
        for y, line in enumerate(lines)
        for x, character in enumerate(line)
        for i in range(2)
        for j in range(4)
        if (ord(character) - BLANK) & DOTS[i][j]
    }


def test_a_rise_goes_from_the_lower_left_to_the_upper_right() -> None:
    drawn = curve_of(0.0, 1.0, 2.0, 3.0).draw(width=2, height=1)
    assert drawn is not None
    lines, low, high = drawn
    # Four columns of dots, four rows: one dot in each column, on the diagonal.
    assert dots_of(lines) == {(0, 3), (1, 2), (2, 1), (3, 0)}
    assert (low, high) == (0.0, 3.0)


def test_a_jump_is_drawn_without_holes() -> None:
    drawn = curve_of(0.0, 0.0, 9.0, 9.0).draw(width=2, height=2)
    assert drawn is not None
    assert dots_of(drawn[0]) == {(0, 7), (1, 7), *((2, row) for row in range(7)), (3, 0)}


def test_a_level_curve_and_a_single_value_are_level_lines() -> None:
    for values in ((0.5,), (0.5, 0.5, 0.5)):
        drawn = curve_of(*values).draw(width=3, height=2)
        assert drawn is not None
        assert dots_of(drawn[0]) == {(column, 4) for column in range(6)}
        assert drawn[1:] == (0.5, 0.5)


def test_columns_are_means_of_stretches_and_lines_between_them() -> None:
    assert columns([(0, 1.0), (1, 3.0), (2, 5.0), (4, 7.0)], 2) == [2.0, 6.0]
    # Steps 0 and 10 in five stretches: the three in between lie on the line.
    assert columns([(0, 0.0), (10, 4.0)], 5) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_without_values_nothing_is_drawn_and_values_that_are_not_finite_are_left_out() -> None:
    assert Curve().draw(10, 2) is None
    assert curve_of(math.nan, math.inf).draw(10, 2) is None
    drawn = curve_of(1.0, math.nan, 2.0).draw(10, 2)
    assert drawn is not None
    assert drawn[1:] == (1.0, 2.0)


def test_a_long_training_is_kept_in_little_memory_with_its_shape() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(step, step / 1000)
    assert len(curve._points) <= MOST_POINTS
    drawn = curve.draw(width=4, height=2)
    assert drawn is not None
    lines, low, high = drawn
    # Eight columns of 12,500 steps: means 6.25 and 93.75, up to how neighbours were averaged.
    assert abs(low - 6.25) < 0.5
    assert abs(high - 93.75) < 0.5
    assert dots_of(lines) == {(column, 7 - column) for column in range(8)}
    assert curve.steps == (pytest.approx(0, abs=200), 99_999)
