"""Errors, intervals and tests: by hand, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from aligndistil.report.statistics import LEVEL, difference, estimate, holm, interval_of_share


def test_of_one_seed_the_error_is_that_of_the_mean_over_prompts() -> None:
    found = estimate([[1.0, 2.0, 6.0, 7.0]])
    assert found.mean == 4.0
    # Deviations -3, -2, 2, 3: 26 / 3 over 4 prompts.
    assert found.error == pytest.approx(math.sqrt(26 / 3 / 4))
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(3.182446 * math.sqrt(26 / 12), rel=1e-6)  # t of 3 degrees of freedom


def test_of_seeds_without_prompts_it_is_that_of_the_mean_over_seeds() -> None:
    found = estimate([[1.0], [2.0], [6.0]])
    assert (found.mean, found.error) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert found.interval[1] - 3.0 == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(3 / math.sqrt(7 / 3), 2))


def test_seeds_and_prompts_each_have_their_part() -> None:
    """Rows 0, 2, 7 and columns -1, 1 added up, and nothing left over."""
    found = estimate(np.array([[0.0], [2.0], [7.0]]) + np.array([[-1.0, 1.0]]))
    assert found.mean == 3.0
    # Seeds: variance 13 over 3; prompts: variance 2 over 2.
    assert found.parts == ((pytest.approx(13 / 3), 2), (pytest.approx(1.0), 1))
    assert found.error == pytest.approx(math.sqrt(13 / 3 + 1))
    assert found.half_width() == pytest.approx(math.sqrt(4.302653**2 * 13 / 3 + 12.706205**2), rel=1e-6)


def test_what_is_left_over_is_counted_with_the_seeds_and_not_with_the_prompts() -> None:
    found = estimate([[0.0, 1.0], [1.0, 0.0]])  # nothing but what is left over: its mean square is 1
    assert found.parts == ((0.0, 1), (0.0, 1))
    found = estimate([[0.0, 3.0], [1.0, 0.0]])
    # Row means 1.5 and 0.5, column means 0.5 and 1.5, left over -1, 1, 1, -1: mean squares 1, 1 and 4.
    assert found.parts == ((pytest.approx(0.25), 1), (0.0, 1))


def test_one_number_has_no_error() -> None:
    assert estimate([[3.0]]).error is None
    assert estimate([[3.0]]).p == 1.0


def test_p_is_where_the_interval_ends_at_zero() -> None:
    random = np.random.default_rng(0)
    found = estimate(0.4 + random.normal(size=(4, 1)) * 0.3 + random.normal(size=(4, 30)))
    assert 1e-6 < found.p < 1
    assert found.half_width(found.p) == pytest.approx(abs(found.mean), rel=1e-6)


def test_all_right_is_not_certainty() -> None:
    """Wilson: 24 of 24 is from n / (n + z²)."""
    low, high = interval_of_share([[1.0] * 24])
    assert low == pytest.approx(24 / (24 + 1.959964**2), rel=1e-6)
    assert high == pytest.approx(1.0)
    assert interval_of_share([[1.0] * 24] * 3) == (low, high)  # three seeds that agree are 24 pairs, not 72
    assert interval_of_share([[0.0] * 24])[1] == pytest.approx(1 - low)
    inside = interval_of_share([[1.0] * 23 + [0.0]])
    assert 0 < inside[0] < 23 / 24 < inside[1] < 1
    assert 23 / 24 - inside[0] > 1.5 * (inside[1] - 23 / 24)  # there is more room below


def test_of_one_seed_a_share_has_wilson_s_own_interval() -> None:
    """40 pairs, 34 right; with the quantile of 39 degrees of freedom and n - 1 in the denominator of the variance."""
    low, high = interval_of_share([[1.0] * 34 + [0.0] * 6])
    p, n, q = 0.85, 39.0, float(stats.t.ppf(0.975, 39))
    roots = np.roots([1 + q**2 / n, -(2 * p + q**2 / n), p**2])  # |p - x| = q sqrt(x (1 - x) / n)
    assert (low, high) == pytest.approx((roots.min(), roots.max()))


def test_holm_by_hand() -> None:
    # 0.01 x 4; then the larger of that and 0.02 x 3; 0.03 x 2; and 0.04 is no smaller than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_differs_by_the_same_everywhere_is_no_sample_of_chance_and_equal_values_are_a_tie() -> None:
    values = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert difference(values, values - 0.5)[1] == 1.0
    assert difference(values, values)[1] == 1.0
    assert difference(values[:1], values[:1] - 0.5)[1] is None  # one seed says nothing of trainings


def trained(random: np.random.Generator, mean: float, prompts: np.ndarray, seeds: int) -> np.ndarray:
    """A method whose trainings differ by 0.3, on prompts that differ by 1."""
    return mean + 0.3 * random.normal(size=(seeds, 1)) + prompts + random.normal(size=(seeds, len(prompts)))


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_cover_the_truth_where_seeds_vary_little(seeds: int) -> None:
    """A tenth of what is left over, 256 prompts: where a variance of seeds that is cut off at 0 covers 88 %."""
    random = np.random.default_rng(seeds)
    covered = 0
    for _ in range(1000):
        values = 0.1 * random.normal(size=(seeds, 1)) + random.normal(size=(seeds, 256))
        low, high = estimate(values).interval
        covered += low < 0 < high
    assert 0.93 <= covered / 1000 <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_two_identical_methods_are_told_apart_in_at_most_one_of_twenty_comparisons(seeds: int) -> None:
    random, found = np.random.default_rng(seeds), 0
    for _ in range(1000):
        prompts = random.normal(size=32)
        _, p = difference(trained(random, 0, prompts, seeds), trained(random, 0, prompts, seeds))
        assert p is not None
        found += holm([p, 1.0])[0] <= LEVEL  # as a table of two rows has it
    assert found <= 50


def test_identical_methods_on_a_grid_are_not_told_apart_more_often() -> None:
    """Steps to a threshold are whole, and often equal: a difference without any spread proves nothing."""
    random = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        one, other = random.integers(1, 5, size=(2, 2, 1)) * 24.0
        _, p = difference(one, other)
        assert p is not None
        found += holm([p, 1.0])[0] <= LEVEL
    assert found <= 50


def test_a_true_gap_is_found_more_often_with_more_seeds() -> None:
    random = np.random.default_rng(0)
    found = {}
    for seeds in (2, 3, 5, 10, 30):
        prompts = random.normal(size=(200, 128))
        ps = [difference(trained(random, 0.36, p, seeds), trained(random, 0.0, p, seeds))[1] for p in prompts]
        found[seeds] = sum(p is not None and p <= 0.05 for p in ps) / 200
    assert list(found.values()) == sorted(found.values())
    assert found[2] < 0.2
    assert found[30] > 0.9


@pytest.mark.parametrize(("seeds", "most"), [(2, 0.98), (3, 0.97), (5, 0.97), (10, 0.97)])
def test_intervals_cover_the_truth_where_seeds_and_prompts_vary(seeds: int, most: float) -> None:
    random = np.random.default_rng(seeds)
    covered = 0
    for _ in range(2000):
        low, high = estimate(trained(random, 0, random.normal(size=64), seeds)).interval
        covered += low < 0 < high
    assert 0.93 <= covered / 2000 <= most
