"""The comparison and the picture, as files."""

import csv
import io
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from aligndistil.errors import UserError
from aligndistil.recipe.sections import ReportColumn
from aligndistil.report import (
    Comparison,
    ModelResult,
    RewardResult,
    convergence,
    load_results,
    rich_table,
    write_report,
)
from aligndistil.report.columns import COLUMNS
from aligndistil.report.latex import latex_tables
from aligndistil.report.panels import CONVERGENCE
from aligndistil.report.plots import smooth
from aligndistil.report.table import csv_table, markdown_table

RESULTS = [
    ModelResult(name="initial", objective="", metrics={"gold_reward": -0.001, "length_mean": 29.64}),
    ModelResult(
        name="dpo", objective="dpo", metrics={"reward_accuracy": 0.7129, "gold_reward": 0.28, "kl": 0.0, "steps": 1200}
    ),
]
COMPARISON = Comparison(kl_to="dpo", results=RESULTS)


def line(step: int, split: str = "train", **metrics: float) -> dict[str, Any]:
    return {"step": step, "split": split, **{name.replace("__", "/"): value for name, value in metrics.items()}}


ON_POLICY = [line(s, reward__token_mean=s / 100, completions__mean_length=30.0) for s in range(1, 41)]
OFF_POLICY = [line(s, reward__token_mean=0.1) for s in range(1, 41)]


def test_markdown_has_formatted_values_and_no_empty_columns() -> None:
    assert markdown_table(COMPARISON) == (
        "| model | objective | reward accuracy (held-out pairs) | gold reward | KL to dpo (nats a sequence)"
        " | mean length (tokens) | steps |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| initial | - | - | 0.00 | - | 29.6 | - |\n"
        "| dpo | dpo | 71.3% | 0.28 | 0.00 | - | 1,200 |\n"
        "\nReward accuracy is of held-out pairs.\n"
        "\nKL is to dpo, in nats, summed over a response of the model's own.\n"
        "\nLength is in tokens.\n"
    )


def test_a_bar_in_a_name_does_not_make_a_column() -> None:
    table = markdown_table(Comparison(kl_to="x", results=[ModelResult(name="a|b", objective="", metrics={})]))
    assert table.splitlines()[-1] == "| a\\|b | - |"


FULL = {"reward_accuracy": 0.7129, "gold_reward": -0.71, "kl": 31.59, "length_mean": 128.1, "steps": 1200}


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(rich_table(comparison, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_table_shows_the_same_in_eighty_columns() -> None:
    full = ModelResult(
        name="aligndistil", objective="aligndistil", metrics=FULL | {"seconds": 3600, "truncated_fraction": 1}
    )
    text = printed(Comparison(kl_to="stage:dpo [x]", results=[*RESULTS, full]), 80)
    assert "aligndistil  aligndistil  71.3%  -0.71  31.59  128.1  100.0%  1,200  3,600" in re.sub(r" {2,}", "  ", text)
    assert "KL is to stage:dpo [x], in nats" in re.sub(r"\s+", " ", text)


def test_the_terminal_table_of_seeds_leaves_out_the_least_important_where_there_is_no_room() -> None:
    metrics = FULL | {column.metric: 1.0 for column in COLUMNS if column.metric not in FULL}
    spread = dict.fromkeys(metrics, 0.05)
    row = ModelResult(
        name="aligndistil_static",
        objective="aligndistil",
        metrics=metrics,
        spread=spread,
        per_seed={"seed-0": metrics, "seed-1": metrics},
    )
    comparison = Comparison(kl_to="dpo", results=[row])
    texts = {width: printed(comparison, width) for width in (80, 100, 120)}
    assert all(max(map(len, text.splitlines())) <= width for width, text in texts.items())
    assert all("71.3±5.0%" in text and "31.59±0.05" in text for text in texts.values())
    shown = {width: len(rich_table(comparison, width).columns) for width in texts}
    assert shown[80] < shown[100] < shown[120]
    assert "objective" not in texts[80]
    assert "Mean ± standard deviation over 2 seeds" in re.sub(r"\s+", " ", texts[80])


def test_the_terminal_table_has_no_empty_columns() -> None:
    heads = ["model", "objective", "reward\naccuracy", "gold\nreward", "KL", "length", "steps"]
    assert [column.header for column in rich_table(COMPARISON).columns] == heads


def test_the_recipe_chooses_columns_and_their_order() -> None:
    chosen = COMPARISON.model_copy(update={"columns": ["steps", "kl"]})
    assert [column.header for column in rich_table(chosen).columns] == ["model", "objective", "steps", "KL"]
    assert markdown_table(chosen).startswith("| model | objective | steps | KL to dpo (nats a sequence) |\n")
    assert "gold" not in latex_tables(chosen)


def test_a_recipe_may_name_just_the_columns_there_are() -> None:
    assert get_args(ReportColumn) == tuple(column.metric for column in COLUMNS)


def test_csv_keeps_every_metric_in_full_precision() -> None:
    extra = ModelResult(name="c", objective="dpo", metrics={"distinct_2": 0.1 + 0.2})
    rows = list(csv.DictReader(csv_table([*RESULTS, extra]).splitlines()))
    assert float(rows[2]["distinct_2"]) == 0.1 + 0.2
    assert rows[0]["kl"] == ""
    assert rows[0]["gold_reward"] == "-0.001"


def test_a_result_leaves_out_what_is_not_finite() -> None:
    assert ModelResult(name="a", objective="", metrics={"kl": float("inf"), "steps": 1}).metrics == {"steps": 1.0}


def test_csv_has_the_spread_beside_the_mean() -> None:
    seeds = {"seed-0": {"kl": 1.0}, "seed-1": {"kl": 3.0}}
    averaged = ModelResult(name="a", objective="dpo", metrics={"kl": 2.0}, spread={"kl": 2**0.5}, per_seed=seeds)
    (row,) = csv.DictReader(csv_table([averaged]).splitlines())
    assert row == {"name": "a", "objective": "dpo", "seeds": "2", "kl": "2.0", "kl_std": repr(2**0.5)}


def test_the_report_is_five_files_and_its_json_reads_back(tmp_path: Path) -> None:
    written = write_report(tmp_path / "report", COMPARISON, {"aligndistil": ON_POLICY})
    names = ["comparison.json", "comparison.csv", "comparison.md", "comparison.tex", "convergence.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(names)
    assert load_results(written[0]) == COMPARISON


def test_rewards_are_a_second_table(tmp_path: Path) -> None:
    rewards = [RewardResult(name="reward_model", kind="score", right={"eval": ["1101"]})]
    written = write_report(tmp_path, COMPARISON.model_copy(update={"rewards": rewards}))
    assert "reward_accuracy.csv" in [path.name for path in written]
    assert "| reward_model | score | 75.0 ± 25.0 |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.tex").read_text().count(r"\begin{table}") == 2


def test_a_report_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"kl_to": "dpo"}')
    with pytest.raises(UserError, match=r"comparison.json is not what this aligndistil writes"):
        load_results(tmp_path / "comparison.json")


def test_without_curves_there_is_no_picture(tmp_path: Path) -> None:
    written = write_report(tmp_path, COMPARISON, {"sft": [line(1, loss=2.0)]})
    assert "convergence.png" not in [path.name for path in written]


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_the_reward_of_given_responses_is_not_drawn_as_convergence(tmp_path: Path) -> None:
    assert convergence({"off": OFF_POLICY}, tmp_path / "off.png") is None
    assert convergence({"on": ON_POLICY}, tmp_path / "on.png") == tmp_path / "on.png"
    # An evaluation's terms are of the eval data's responses, even where samples were drawn beside them.
    evaluated = [line(8, "eval", reward__token_mean=0.1, completions__mean_length=20.0)]
    assert convergence({"on": evaluated}, tmp_path / "eval.png") is None


def test_each_metric_that_a_stage_has_gets_its_panel(tmp_path: Path) -> None:
    pairs = [line(s, rewards__margins=s / 10, rewards__accuracies=0.5) for s in range(1, 31)]
    pairs += [line(30, "eval", rewards__margins=2.0, gold_reward=0.3)]
    one, four = tmp_path / "one.png", tmp_path / "four.png"
    convergence({"aligndistil": ON_POLICY}, one)
    convergence({"dpo": pairs, "aligndistil": ON_POLICY}, four)
    assert size(one)[0] >= 1000
    assert size(four)[0] > size(one)[0]
    assert size(four)[1] > 1.5 * size(one)[1]


def test_drawing_leaves_no_warning_and_no_global_state(tmp_path: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import sys; from pathlib import Path\n"
        "from aligndistil.report import convergence\n"
        "assert 'matplotlib' not in sys.modules\n"
        "line = {'step': 1, 'split': 'train', 'rewards/margins': 0.1}\n"
        "lines = [line, {'step': 1, 'split': 'eval', 'gold_reward': 0}]\n"
        "convergence({'a': lines, 'empty': []}, Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one.png")], check=True)
    assert (tmp_path / "one.png").exists()


def test_smoothing_averages_over_the_window_and_over_what_there_is_at_the_ends() -> None:
    assert smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert smooth([2.0] * 5, 4) == [2.0] * 5
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


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
