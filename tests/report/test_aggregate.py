"""Seeds averaged, the best printed bold, and the same in LaTeX."""

from __future__ import annotations

from typing import Any

import pytest

from aligndistil.report import Comparison, ModelResult, RewardResult, rich_table
from aligndistil.report.aggregate import best, over_seeds, rewards_over_seeds
from aligndistil.report.columns import BY_METRIC
from aligndistil.report.latex import latex_escape, latex_tables
from aligndistil.report.table import markdown_table

GOLD, SECONDS, KL = (BY_METRIC[name] for name in ("gold_reward", "seconds", "kl"))


def row(name: str, **metrics: tuple[float, float]) -> ModelResult:
    """Of two seeds; each metric is its mean and its standard deviation."""
    means = {metric: mean for metric, (mean, _) in metrics.items()}
    spread = {metric: deviation for metric, (_, deviation) in metrics.items()}
    return ModelResult(name=name, objective="dpo", metrics=means, spread=spread, per_seed={"a": means, "b": means})


def test_seeds_are_averaged_with_n_minus_one_in_the_denominator() -> None:
    seeds = {
        f"seed-{k}": ModelResult(name="dpo", objective="dpo", metrics={"kl": kl, "steps": 94})
        for k, kl in enumerate((1.0, 2.0, 6.0))
    }
    averaged = over_seeds(seeds)
    assert averaged.metrics == {"kl": 3.0, "steps": 94.0}
    assert averaged.spread == {"kl": 7**0.5, "steps": 0.0}  # (4 + 1 + 9) / 2
    assert averaged.per_seed["seed-2"] == {"kl": 6.0, "steps": 94.0}


def test_a_metric_that_a_seed_lacks_is_left_out() -> None:
    both = {"kl": 1.0, "gold_reward": 0.5}
    seeds = {
        "0": ModelResult(name="a", objective="", metrics=both),
        "1": ModelResult(name="a", objective="", metrics={"kl": 2.0}),
    }
    averaged = over_seeds(seeds)
    assert averaged.metrics == {"kl": 1.5}
    assert averaged.per_seed["0"] == both


def test_rewards_of_seeds_keep_each_seeds_pairs() -> None:
    seeds = [
        RewardResult(name="dpo / initial", kind="implicit", right={"eval": ["10"], "train": ["1"]}),
        RewardResult(name="dpo / initial", kind="implicit", right={"eval": ["11"]}),
    ]
    assert rewards_over_seeds(seeds).right == {"eval": ["10", "11"]}


@pytest.mark.parametrize(
    ("others", "wins"),
    [
        ([(0.5, 0.1)], True),  # 0.2 apart, sqrt(0.01 + 0.01) = 0.14
        ([(0.57, 0.1)], False),  # 0.13
        ([(0.5, 0.1), (0.3, 0.4)], False),  # the third is 0.4 apart, within sqrt(0.01 + 0.16) = 0.41
        ([(0.7, 0.0)], False),  # a tie
        ([], False),  # nothing to be better than
    ],
)
def test_the_best_is_bold_when_it_is_further_from_each_other_than_their_spread(others: Any, wins: bool) -> None:
    first = row("first", gold_reward=(0.7, 0.1))
    rows = [row(f"other-{i}", gold_reward=other) for i, other in enumerate(others)]
    assert (best([*rows, first], GOLD) is first) == wins


def test_equal_means_without_spread_are_a_tie() -> None:
    assert best([row("a", gold_reward=(0.7, 0.0)), row("b", gold_reward=(0.7, 0.0))], GOLD) is None


def test_each_column_has_its_own_direction_and_some_have_none() -> None:
    fast, slow = row("fast", seconds=(10, 1), kl=(1, 0.1)), row("slow", seconds=(20, 1), kl=(9, 0.1))
    assert best([slow, fast], SECONDS) is fast
    assert best([slow, fast], KL) is None


def test_nothing_is_bold_without_seeds() -> None:
    alone = [ModelResult(name=n, objective="", metrics={"gold_reward": v}) for n, v in (("a", 1.0), ("b", 0.0))]
    assert best(alone, GOLD) is None
    assert best([row("seeds", gold_reward=(5.0, 0.1)), *alone], GOLD) is None


WINNER = Comparison(
    kl_to="dpo_50%",
    results=[row("a_1", gold_reward=(-0.5, 0.1), kl=(2, 0.25)), row("b&c", gold_reward=(0.7, 0.1), kl=(3, 0.25))],
)


def test_the_same_cell_is_bold_in_every_table() -> None:
    assert "| b&c | dpo | **0.70 ± 0.10** | 3.00 ± 0.25 |" in markdown_table(WINNER)
    assert "**-" not in markdown_table(WINNER)
    (cells,) = (list(column.cells) for column in rich_table(WINNER, 120).columns if column.header == "gold\nreward")
    assert cells == ["-0.50±0.10", "[bold]0.70±0.10[/]"]


def test_latex_is_escaped_and_made_with_booktabs() -> None:
    text = latex_tables(WINNER)
    assert r"a\_1 & dpo & $-$0.50 $\pm$ 0.10 & 2.00 $\pm$ 0.25 \\" in text
    assert r"b\&c & dpo & \textbf{0.70 $\pm$ 0.10} & 3.00 $\pm$ 0.25 \\" in text
    assert r"KL to dpo\_50\% (nats a sequence)" in text
    order = [r"\begin{tabular}{llrr}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}", r"\caption{"]
    assert sorted(order, key=text.index) == order


def test_every_character_that_latex_reads_is_escaped() -> None:
    assert latex_escape(r"\&%$#_{}~^<>|") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
    )
    assert latex_escape("[*] 1.5 - 2") == "{[}{*}] 1.5 - 2"


def test_rows_of_different_numbers_of_seeds_say_theirs() -> None:
    single = ModelResult(name="trl", objective="", metrics={"gold_reward": 0.5})
    table = markdown_table(Comparison(kl_to="dpo", results=[row("ours", gold_reward=(0.7, 0.1)), single]))
    assert "| ours | dpo | 2 | 0.70 ± 0.10 |" in table
    assert "| trl | - | 1 | 0.50 |" in table
    assert "over the seeds of each row" in table
