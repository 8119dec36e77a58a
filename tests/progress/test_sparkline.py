"""The course of a metric: what it keeps, and how it is drawn."""

import math
import tracemalloc

import pytest

from aligndistil.progress.sparkline import BLOCKS, Course


def course_of(*values: float) -> Course:
    course = Course()
    for step, value in enumerate(values, 1):
        course.add(step, value)
    return course


def test_a_rise_goes_from_the_lowest_block_to_the_highest() -> None:
    assert course_of(*range(8)).sparkline(20) == BLOCKS
    assert course_of(*range(16)).sparkline(8) == BLOCKS  # means of two steps


def test_a_level_course_and_a_single_value_are_level_lines() -> None:
    assert course_of(0.5).sparkline(10) == "▄"
    assert course_of(0.5, 0.5, 0.5).sparkline(10) == "▄▄▄"


def test_steps_that_were_not_logged_are_as_high_as_the_one_before() -> None:
    course = Course()
    for step, value in ((10, 0.0), (20, 7.0), (23, 3.0), (24, 7.0)):
        course.add(step, value)
    assert course.sparkline(99) == "▁▁▁▁▁▁▁▁▁▁███▄█"


@pytest.mark.parametrize("width", [1, 7, 60])
def test_a_sparkline_is_no_wider_than_asked(width: int) -> None:
    assert len(course_of(*range(100)).sparkline(width)) == width


def test_without_values_or_room_nothing_is_drawn_and_values_that_are_not_finite_are_left_out() -> None:
    assert Course().sparkline(10) == ""
    assert course_of(1.0, 2.0).sparkline(0) == ""
    assert course_of(math.nan, math.inf).sparkline(10) == ""
    course = course_of(1.0, 2.0, math.nan)
    assert course.sparkline(10) == "▁█"
    assert math.isnan(course.last)


def test_a_long_training_is_kept_in_little_memory_with_its_shape() -> None:
    course = Course()
    tracemalloc.start()
    for step in range(100_000):
        course.add(step, step / 1000)
    assert tracemalloc.get_traced_memory()[0] < 2e6
    tracemalloc.stop()
    assert course.sparkline(8) == BLOCKS
    assert course.last == 99.999
