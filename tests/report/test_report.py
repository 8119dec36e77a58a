"""The comparison and the picture, as files."""

import csv
import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aligndistil.report import ModelResult, convergence, load_results, rich_table, write_report
from aligndistil.report.plots import PANELS, smooth
from aligndistil.report.table import COLUMNS, csv_table, markdown_table

RESULTS = [
    ModelResult(name="initial", objective="", metrics={"gold_reward": -0.001, "length_mean": 29.64}),
    ModelResult(
        name="dpo", objective="dpo", metrics={"reward_accuracy": 0.7129, "gold_reward": 0.28, "kl": 0.0, "steps": 1200}
    ),
]


def line(step: int, split: str = "train", **metrics: float) -> dict[str, Any]:
    return {"step": step, "split": split, **{name.replace("__", "/"): value for name, value in metrics.items()}}


ON_POLICY = [line(s, reward__token_mean=s / 100, completions__mean_length=30.0) for s in range(1, 41)]
OFF_POLICY = [line(s, reward__token_mean=0.1) for s in range(1, 41)]


def test_markdown_has_formatted_values_and_no_empty_columns() -> None:
    assert markdown_table(RESULTS, "dpo") == (
        "| model | objective | reward accuracy (held-out pairs) | gold reward | KL to dpo (nats a sequence)"
        " | mean length (tokens) | steps |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| initial | - | - | 0.00 | - | 29.6 | - |\n"
        "| dpo | dpo | 71.3% | 0.28 | 0.00 | - | 1,200 |\n"
    )


def test_a_bar_in_a_name_does_not_make_a_column() -> None:
    table = markdown_table([ModelResult(name="a|b", objective="", metrics={})], "x")
    assert table.splitlines()[-1] == "| a\\|b | - |"


def test_the_terminal_table_shows_the_same_in_eighty_columns() -> None:
    full = {"reward_accuracy": 0.7129, "gold_reward": -0.71, "kl": 31.59, "length_mean": 128.1, "steps": 1200}
    results = [
        *RESULTS,
        ModelResult(
            name="aligndistil", objective="aligndistil", metrics=full | {"seconds": 3600, "truncated_fraction": 1}
        ),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table(results, "stage:dpo [x]"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "aligndistil  aligndistil  71.3%  -0.71  31.59  128.1  100.0%  1,200  3,600" in re.sub(r" {2,}", "  ", text)
    assert "KL is to stage:dpo [x], in nats" in re.sub(r"\s+", " ", text)


def test_the_terminal_table_has_no_empty_columns() -> None:
    table = rich_table(RESULTS, "dpo")
    heads = ["model", "objective", "reward\naccuracy", "gold\nreward", "KL", "length", "steps"]
    assert [column.header for column in table.columns] == heads


def test_csv_keeps_every_metric_in_full_precision() -> None:
    extra = ModelResult(name="c", objective="dpo", metrics={"distinct_2": 0.1 + 0.2})
    rows = list(csv.DictReader(csv_table([*RESULTS, extra]).splitlines()))
    assert float(rows[2]["distinct_2"]) == 0.1 + 0.2
    assert rows[0]["kl"] == ""
    assert rows[0]["gold_reward"] == "-0.001"


def test_a_result_leaves_out_what_is_not_finite() -> None:
    assert ModelResult(name="a", objective="", metrics={"kl": float("inf"), "steps": 1}).metrics == {"steps": 1.0}


def test_the_report_is_four_files_and_its_json_reads_back(tmp_path: Path) -> None:
    written = write_report(tmp_path / "report", RESULTS, {"aligndistil": ON_POLICY}, "dpo")
    names = ["comparison.json", "comparison.csv", "comparison.md", "convergence.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(names)
    assert load_results(written[0]).results == RESULTS
    assert json.loads(written[0].read_text())["kl_to"] == "dpo"


def test_without_curves_there_is_no_picture(tmp_path: Path) -> None:
    written = write_report(tmp_path, RESULTS, {"sft": [line(1, loss=2.0)]}, "dpo")
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
PACKAGE = Path(__file__).parents[2] / "aligndistil"
LOGGING = [PACKAGE / "maths.py", *sorted((PACKAGE / "objectives").glob("*.py"))]


def documented() -> list[str]:
    rows = [row for row in METRICS_MD.read_text().splitlines() if row.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_what_is_drawn_and_tabled_is_in_the_documents_table() -> None:
    used = {panel.metric for panel in PANELS} | {column.metric for column in COLUMNS}
    assert used - set(documented()) == set()


def test_every_row_of_the_document_has_four_cells_on_github() -> None:
    rows = [row for row in METRICS_MD.read_text().splitlines() if row.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_the_document_defines_each_name_once() -> None:
    names = documented()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", LOGGING, ids=lambda file: file.stem)
def test_what_an_objective_logs_is_in_the_documents_table(file: Path) -> None:
    logged = re.findall(r'"([a-z_]+/[a-z_]+)": ', file.read_text())
    assert set(logged) - set(documented()) == set()
