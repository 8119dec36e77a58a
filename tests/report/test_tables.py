"""The comparison as tables, and the numbers in them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from aligndistil.errors import UserError
from aligndistil.recipe.sections import _RENAMED, ReportColumn
from aligndistil.report import ComparedWith, Comparison, ModelResult, RewardResult, load_results, rich_rewards
from aligndistil.report import rich_table as table_of
from aligndistil.report.combine import _with_differences, summarise
from aligndistil.report.figures import CONVERGENCE
from aligndistil.report.tables import (
    BENCHMARKS,
    BY_METRIC,
    COLUMNS,
    columns_of,
    difference_cells,
    differences_csv,
    latex,
    markdown,
    reward_cells,
    rewards_csv,
)
from aligndistil.report.tables import csv as csv_table

DPO = ComparedWith(name="dpo")
RESULTS = [
    ModelResult(name="initial", objective="", metrics={"gold_reward": -0.001, "completions/mean_length": 29.64}),
    ModelResult(
        name="dpo",
        objective="dpo",
        method="DPO",
        setting="3 epochs",
        metrics={"rewards/accuracies": 0.7129, "gold_reward": 0.28, "kl": 0.0, "steps": 1200},
        errors={"rewards/accuracies": 0.0283, "gold_reward": 0.04, "kl": 0.0},
        intervals={"rewards/accuracies": (0.655, 0.769), "gold_reward": (0.2, 0.36), "kl": (0.0, 0.0)},
    ),
]
COMPARISON = Comparison(kl_to=DPO, results=RESULTS)


def trained(name: str, **values: Any) -> ModelResult:
    """Of S seeds: each metric is the mean of (S, P) values."""
    seeds = {}
    for k in range(len(next(iter(values.values())))):
        own = {metric.replace("__", "/"): list(map(float, rows[k])) for metric, rows in values.items()}
        means = {metric: float(np.mean(row)) for metric, row in own.items()}
        kept = {metric: [row] for metric, row in own.items()}
        asked = {"measured_on": "abc", "train_seeds": [k]}
        seeds[f"seed-{k}"] = ModelResult(name=name, objective="dpo", metrics=means, values=kept, **asked)
    return summarise(seeds)


def compared(*rows: ModelResult, **more: Any) -> Comparison:
    return _with_differences(Comparison(kl_to=DPO, results=list(rows), measured_on="abc", **more))


def test_markdown_has_formatted_values_and_no_empty_columns() -> None:
    table, *notes = markdown(COMPARISON).split("\n\n")
    assert table == (
        "| model | stage | gold reward | reward accuracy (held-out pairs) | KL to DPO, 3 epochs (nats per response)"
        " | mean length (tokens) | steps |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| initial | initial | 0.00 | - | - | 29.6 | - |\n"
        "| DPO, 3 epochs | dpo | 0.28 ± 0.04 | 71.3 ± 2.8% | 0.00 | - | 1,200 |"
    )
    assert "KL is to DPO, 3 epochs, in nats, summed over a response of the model's own." in notes
    assert notes[-1].startswith("± is the standard error over prompts (or pairs): of these trained models")


def test_a_bar_in_a_name_does_not_make_a_column() -> None:
    table = markdown(Comparison(results=[ModelResult(name="a|b", objective="", metrics={})]))
    assert table.splitlines()[-1] == "| a\\|b |"


def test_where_all_prompts_agree_the_interval_is_shown() -> None:
    alone = trained("a", rewards__accuracies=[[1.0] * 24])
    assert BY_METRIC["rewards/accuracies"].cell(alone) == "100.0 [86.2, 100.0%]"


def test_seeds_are_averaged_with_n_minus_one_in_the_denominator() -> None:
    row = trained("a", kl=[[1.0], [2.0], [6.0]])
    assert row.metrics == {"kl": 3.0}
    assert row.spread == {"kl": pytest.approx(7**0.5)}
    assert row.errors == {"kl": pytest.approx((7 / 3) ** 0.5)}
    assert row.per_seed["seed-2"] == {"kl": 6.0}


def test_a_metric_that_a_seed_lacks_is_left_out() -> None:
    both = {"kl": 1.0, "gold_reward": 0.5}
    seeds = {
        "0": ModelResult(name="a", objective="", metrics=both),
        "1": ModelResult(name="a", objective="", metrics={"kl": 2.0}),
    }
    averaged = summarise(seeds)
    assert averaged.metrics == {"kl": 1.5}
    assert averaged.per_seed["0"] == both


NOISE = np.random.default_rng(0).normal(size=(3, 40)) * 0.1
OTHER = np.random.default_rng(1).normal(size=(3, 40)) * 0.1


def test_the_best_is_bold_only_when_every_other_is_worse_beyond_chance_and_the_difference_is_printed() -> None:
    best, worse = trained("best", gold_reward=NOISE + 1), trained("worse", gold_reward=NOISE[::-1] * 0.9)
    table = compared(trained("reverse", gold_reward=OTHER - 1), worse, best)
    assert table.best == {"gold_reward": "best"}
    assert "| **1.01 ± 0.01** |" in markdown(table)
    (row,) = [one for one in table.differences if one.name == "worse"]
    assert row.mean == pytest.approx(worse.metrics["gold_reward"] - best.metrics["gold_reward"])
    assert row.low < row.mean < row.high < 0
    assert f"| worse | {row.mean:+.2f} [{row.low:+.2f}, {row.high:+.2f}] |" in markdown(table)
    level = trained("level", gold_reward=NOISE[::-1] + 1)
    undecided = compared(trained("reverse", gold_reward=OTHER - 1), worse, best, level)
    assert undecided.best == {}
    assert len(undecided.differences) == 3


def test_a_single_seed_has_intervals_and_no_bold() -> None:
    table = compared(trained("a", gold_reward=NOISE[:1]), trained("b", gold_reward=NOISE[:1] + 1))
    assert table.best == {}
    (one,) = table.differences
    assert (one.name, one.best) == ("a", "b")
    cells = difference_cells(table, COLUMNS)
    assert cells is not None
    assert "Of these trained models, not of another training." in cells.notes[0]


def test_rows_that_were_asked_other_prompts_have_no_difference() -> None:
    rows = trained("a", gold_reward=NOISE), trained("b", gold_reward=NOISE + 1)
    other = rows[1].model_copy(update={"measured_on": "others"})
    assert not compared(rows[0], other).differences
    unlike = trained("b", gold_reward=NOISE[:, :7] + 1)
    assert not compared(rows[0], unlike).differences
    assert not compared(rows[0], trained("b", gold_reward=NOISE[:2] + 1)).differences


def test_runs_of_other_seeds_are_not_paired_and_a_note_says_so() -> None:
    three, two = trained("a", gold_reward=NOISE), trained("b", gold_reward=NOISE + 1)
    other = trained("late", gold_reward=NOISE + 2).model_copy(update={"train_seeds": [5, 6, 7]})
    table = compared(three, two, other)
    assert {one.name for one in table.differences} == {"a"}
    assert table.notes == ["Not compared with the others, since its seeds are others: late."]


def test_what_has_no_better_side_has_no_best() -> None:
    rows = trained("a", kl=NOISE + 5), trained("b", kl=NOISE + 1)
    assert compared(*rows).differences == []


def test_rows_of_different_numbers_of_seeds_say_theirs() -> None:
    single = ModelResult(name="trl", objective="", metrics={"gold_reward": 0.5})
    table = markdown(Comparison(results=[trained("ours", gold_reward=NOISE), single]))
    assert "| ours | 3 | 0.01 ± 0.01 |" in table
    assert "| trl | 1 | 0.50 |" in table
    assert "over the seeds of each row" in table


# ---- the terminal

FULL = {
    "rewards/accuracies": 0.7129,
    "gold_reward": -0.71,
    "kl": 31.59,
    "completions/mean_length": 128.1,
    "steps": 1200,
} | {column.metric: 1.0 for column in COLUMNS if column not in BENCHMARKS and column.metric not in ("kl", "steps")}


def columns_shown(comparison: Comparison, width: int) -> list[str]:
    table = table_of(comparison, width).renderables[0]
    assert isinstance(table, Table)
    return [str(column.header) for column in table.columns]


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table_of(comparison, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_in_a_narrow_terminal_columns_give_way_by_importance_and_no_word_breaks(width: int) -> None:
    row = ModelResult(
        name="aligndistil_static", objective="aligndistil", method="AlignDistil (constant)", metrics=FULL,
        errors=dict.fromkeys(FULL, 0.05),
    )  # fmt: skip
    text = printed(Comparison(kl_to=DPO, results=[row]), width)
    assert max(map(len, text.splitlines())) <= width
    assert "AlignDistil (constant)" in text
    head = text[: text.index("─")]
    assert "gold" in head
    assert "model" in head
    measured = sorted((column for column in COLUMNS if column.metric in FULL), key=lambda column: column.rank)
    shown = [column.metric for column in measured if column.short.split("\n")[-1] in head]
    assert shown[0] == "gold_reward"


def test_wider_terminals_show_more() -> None:
    rows = [ModelResult(name="a", objective="dpo", metrics=FULL, errors=dict.fromkeys(FULL, 0.05))]
    comparison = Comparison(kl_to=DPO, results=rows)
    counts = [len(columns_shown(comparison, width)) for width in (50, 80, 120, 200)]
    assert counts == sorted(set(counts))


def test_the_recipe_chooses_columns_and_their_order() -> None:
    chosen = COMPARISON.model_copy(update={"columns": ["steps", "kl"]})
    assert columns_shown(chosen, 20) == ["model", "steps", "KL"]
    assert markdown(chosen).startswith("| model | stage | steps | KL to DPO, 3 epochs (nats per response) |\n")
    assert "gold" not in latex(chosen)


def test_a_recipe_may_name_just_the_columns_there_are() -> None:
    of_models = [column.metric for column in COLUMNS if not column.metric.startswith(("reward_bench_2", "human_"))]
    assert get_args(ReportColumn) == tuple(of_models)
    assert set(_RENAMED.values()) <= set(BY_METRIC)


def test_two_columns_of_one_heading_are_both_in_the_paper(tmp_path: Path) -> None:
    rows = [ModelResult(name="a", objective="", metrics={"kl": 1.0, "kl_initial": 1.0})]
    both = Comparison(results=rows, kl_to=ComparedWith(name="initial"), columns=["kl", "kl_initial"])
    assert latex(both).count("KL to initial (nats per response)") == 2


def test_kl_to_the_initial_model_is_shown_once() -> None:
    rows = [ModelResult(name="a", objective="", metrics={"kl": 1.0, "kl_initial": 1.0})]
    assert [column.metric for column in columns_of(Comparison(results=rows))] == ["kl_initial"]


# ---- LaTeX and CSV


def test_latex_is_escaped_and_made_with_booktabs() -> None:
    rows = trained("b&c_1", gold_reward=NOISE + 1), trained("worse", gold_reward=OTHER - 1)
    text = latex(compared(*rows, notes=["50 % of ~x^2 {y} \\z"]))
    assert r"b\&c\_1 & \textbf{1.01 $\pm$ 0.01} \\" in text
    assert r"50 \% of \textasciitilde{}x\textasciicircum{}2 \{y\} \textbackslash{}z" in text
    order = [r"\caption{", r"\begin{tabular}{lr}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}}"]
    assert sorted(order, key=text.index) == order
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2  # the second has the differences
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_csv_keeps_every_metric_in_full_precision_with_its_error() -> None:
    extra = ModelResult(name="c", objective="dpo", metrics={"distinct_2": 0.1 + 0.2})
    first, second, third = csv.DictReader(csv_table(Comparison(results=[*RESULTS, extra])).splitlines())
    assert float(third["distinct_2"]) == 0.1 + 0.2
    assert first["kl"] == ""
    assert first["gold_reward"] == "-0.001"
    assert (second["gold_reward_se"], second["gold_reward_low"], second["gold_reward_high"]) == ("0.04", "0.2", "0.36")
    (row,) = csv.DictReader(csv_table(Comparison(results=[trained("a", kl=[[1.0], [3.0]])])).splitlines())
    assert (row["seeds"], row["kl"], row["kl_std"], row["kl_se"]) == ("2", "2.0", repr(2**0.5), "1.0")


def test_differences_are_written_in_full() -> None:
    table = compared(trained("a", gold_reward=NOISE), trained("b", gold_reward=NOISE[::-1] + 1))
    (row,) = csv.DictReader(differences_csv(table).splitlines())
    assert (row["metric"], row["name"], row["best"]) == ("gold_reward", "a", "b")
    assert float(row["mean"]) == table.differences[0].mean
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])


def test_a_result_leaves_out_what_is_not_finite() -> None:
    assert ModelResult(name="a", objective="", metrics={"kl": float("inf"), "steps": 1}).metrics == {"steps": 1.0}


def test_a_report_of_another_program_or_of_before_is_refused(tmp_path: Path) -> None:
    for content in ('{"kl_to": "dpo"}', '{"kl_to": "dpo", "results": []}'):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(UserError, match=r"comparison.json is not what this aligndistil writes"):
            load_results(tmp_path / "comparison.json")


# ---- rewards

REWARDS = [
    RewardResult(name="reward_model", kind="score", of="reward_model", right={"train": ["1111"], "eval": ["110="]}),
    RewardResult(name="dpo / initial", kind="implicit", of="dpo", right={"train": ["0101"], "eval": ["1000"]}),
]


def test_accuracies_count_a_tie_as_half_and_have_errors_or_an_interval() -> None:
    cells = reward_cells(REWARDS)
    assert cells.heads == [
        "reward", "kind", "training pairs (%)", "held-out pairs (%)", "difference, training pairs",
        "difference, held-out pairs",
    ]  # fmt: skip
    # 2.5 of 4; deviations 0.375, 0.375, -0.625, -0.125: variance 0.6875 / 3 over 4.
    assert cells.rows[0][2:4] == ["100.0 [51.0, 100.0]", f"62.5 ± {100 * (0.6875 / 12) ** 0.5:.1f}"]
    assert cells.rows[0][4:] == ["-", "-"]
    assert cells.rows[1][5].startswith("-37.5 [")
    assert "Of 4 training pairs and 4 held-out pairs." in cells.notes


def test_a_table_of_rewards_that_was_asked_for_and_cannot_be_is_said() -> None:
    asked = COMPARISON.model_copy(update={"show_rewards": True})
    assert "No rewards to compare: the eval data have no pairs" in markdown(asked)
    assert "No rewards" not in markdown(COMPARISON)


def test_rewards_of_other_pairs_have_no_difference() -> None:
    other = REWARDS[1].model_copy(update={"measured_on": "others"})
    assert reward_cells([REWARDS[0], other]).rows[1][4:] == ["-", "-"]


def test_differences_are_to_the_contrastive_reward_where_there_is_one() -> None:
    contrastive = RewardResult(name="dpo / reverse", kind="contrastive", right={"eval": ["1111"], "train": ["1111"]})
    assert reward_cells([*REWARDS, contrastive]).rows[2][4:] == ["-", "-"]


def test_the_rewards_csv_has_a_row_for_each_split_and_the_terminal_no_training_differences() -> None:
    rows = list(csv.DictReader(rewards_csv(REWARDS).splitlines()))
    assert [(row["reward"], row["split"], row["accuracy"]) for row in rows] == [
        ("reward_model", "train", "1.0"), ("reward_model", "eval", "0.625"),
        ("dpo / initial", "train", "0.5"), ("dpo / initial", "eval", "0.25"),
    ]  # fmt: skip
    table = rich_rewards(REWARDS).renderables[0]
    assert isinstance(table, Table)
    assert not [column for column in table.columns if str(column.header).startswith("difference, training")]


# ---- the document of metrics

METRICS_MD = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> list[str]:
    rows = [row for row in METRICS_MD.read_text().splitlines() if row.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_what_is_drawn_and_tabled_is_in_the_documents_table() -> None:
    used = {*CONVERGENCE} | {column.metric for column in COLUMNS}
    assert used - set(documented()) == set()


def test_every_row_of_the_document_has_four_cells_on_github() -> None:
    rows = [row for row in METRICS_MD.read_text().splitlines() if row.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_the_document_defines_each_name_once() -> None:
    names = documented()
    assert len(names) == len(set(names))
