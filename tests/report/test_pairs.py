"""Accuracies of rewards, their standard errors, and the paired interval of their differences."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from aligndistil.report import RewardResult
from aligndistil.report.pairs import accuracy, compared_with, difference
from aligndistil.report.pairs_table import reward_cells, rewards_csv, rewards_markdown, rewards_rich


def reward(name: str, *seeds: str, kind: Any = "score", split: str = "eval") -> RewardResult:
    return RewardResult(name=name, kind=kind, right={split: list(seeds)})


def test_an_accuracy_has_the_standard_error_of_its_pairs() -> None:
    found = accuracy(reward("a", "1" * 700 + "0" * 300), "eval")
    assert found is not None
    assert found.mean == pytest.approx(0.7)
    # sqrt(0.7 * 0.3 / 999): the 1.4 points that a table of 1,000 pairs cannot see below
    assert found.error == pytest.approx(0.014499, abs=1e-6)
    assert found.interval == pytest.approx((0.67158, 0.72842), abs=1e-5)
    assert accuracy(reward("a", "10"), "train") is None


def test_a_difference_is_paired() -> None:
    """Of 1,000 pairs 600 are right by both and 280 by neither, 70 by the first alone and 50 by the second alone."""
    first = reward("first", "1" * 600 + "0" * 280 + "1" * 70 + "0" * 50)
    second = reward("second", "1" * 600 + "0" * 280 + "0" * 70 + "1" * 50)
    found = difference(first, second, "eval")
    assert found is not None
    assert found.mean == pytest.approx(0.020)
    # sum of squares 120, so the variance is (120 - 1000 * 0.02^2) / 999 = 0.11972, and its error sqrt(0.11972 / 1000)
    assert found.error == pytest.approx(0.010942, abs=1e-6)
    assert found.interval == pytest.approx((-0.001446, 0.041446), abs=1e-6)
    assert found.error < (accuracy(first, "eval") or found).error
    assert difference(second, first, "eval") == pytest.approx((-found.mean, found.error, 1000))


def test_pairs_of_another_number_are_not_paired() -> None:
    assert difference(reward("a", "101"), reward("b", "10"), "eval") is None
    elsewhere = reward("b", "100").model_copy(update={"measured_on": "other pairs"})
    assert difference(reward("a", "101"), elsewhere, "eval") is None


def test_with_several_seeds_a_pair_counts_with_the_share_that_rank_it_right() -> None:
    found = accuracy(reward("a", "110", "100"), "eval")  # 1, 1/2, 0
    assert found == pytest.approx((0.5, 0.5 / 3**0.5, 3))


REWARDS = [
    reward("reward_model", "1110" * 250),
    reward("dpo / initial", "1100" * 250, kind="implicit"),
    reward("dpo / reverse_dpo", "1110" * 250, kind="contrastive"),
]


def test_all_are_compared_with_the_contrastive_reward() -> None:
    assert compared_with(REWARDS).name == "dpo / reverse_dpo"
    assert compared_with(REWARDS[:2]).name == "reward_model"


def test_the_table_prints_points_and_says_what_they_are_worth() -> None:
    text = rewards_markdown(REWARDS)
    assert "| reward | kind | held-out pairs (%) | difference, held-out pairs |" in text
    assert "Differences to dpo / reverse_dpo are in points, of the same pairs" in text
    assert "| reward_model | score | 75.0 ± 1.4 | +0.0 [+0.0, +0.0] |" in text
    assert "| dpo / initial | implicit | 50.0 ± 1.6 | -25.0 [-27.7, -22.3] |" in text
    assert "| dpo / reverse_dpo | contrastive | 75.0 ± 1.4 | - |" in text
    assert "1,000 held-out pairs: the standard error (after ±) is 1.4 to 1.6 points." in text
    assert rewards_rich(REWARDS).row_count == 3


def test_the_csv_has_full_precision_and_the_interval() -> None:
    rows = list(csv.DictReader(io.StringIO(rewards_csv(REWARDS))))
    assert [row["reward"] for row in rows] == [one.name for one in REWARDS]
    assert (rows[1]["accuracy"], rows[1]["pairs"], rows[1]["seeds"]) == ("0.5", "1000", "1")
    assert (rows[1]["compared_with"], rows[1]["difference"]) == ("dpo / reverse_dpo", "-0.25")
    assert float(rows[1]["low_95"]) == pytest.approx(-0.27685, abs=1e-5)
    assert rows[2]["difference"] == ""


def test_one_reward_has_nothing_to_differ_from() -> None:
    assert reward_cells(REWARDS[:1]).heads == ["reward", "kind", "held-out pairs (%)"]
