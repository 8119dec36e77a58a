"""`report.benchmarks`: a recipe's models are judged when they are compared, once, and seeds are put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligndistil.judge import client
from aligndistil.rollout import LoadedModel
from support.judge_server import JudgeServer
from support.recipes import merged, three_stages

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run) -> Run:
    """The command line, with pauses of no length."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    return command_line


@pytest.fixture
def write(
    recipe_file: Callable[..., Path], model_folder: Callable[..., str], pairs_file: Callable[..., str]
) -> Callable[..., Path]:
    def recipe(**report: Any) -> Path:
        over = {
            "train": {"max_steps": 2},
            "evaluation": {"every": None, "samples": 0},
            "report": {"samples": 4, "pairs": 4, **report},
            "stages": {"scorer": {"objective": {"name": "reward_model"}}},
        }
        return recipe_file(merged(three_stages(model_folder(seed=0), pairs_file(10)), over))

    return recipe


def prefers_shorter(request: dict[str, Any]) -> str:
    text = request["messages"][1]["content"]
    first, second = (text.split(f"<answer {name}>\n")[1].split(f"\n</answer {name}>")[0] for name in "AB")
    shorter = len(first) - len(second)
    return "[[A]]" if shorter < 0 else "[[B]]" if shorter > 0 else "[[tie]]"


def expected(folder: Path, model: str) -> float:
    """Percent of answers that are shorter than DPO's, from what was written of both."""
    texts = {}
    for name in (model, "dpo"):
        lines = (folder / "benchmarks" / "pairwise" / "answers" / f"{name}.jsonl").read_text().splitlines()
        texts[name] = [len(json.loads(line)["response"]) for line in lines]
    wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in zip(texts[model], texts["dpo"], strict=True)]
    return 100 * sum(wins) / len(wins)


def test_models_are_judged_once_and_seeds_are_averaged(
    run: Run, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with JudgeServer(prefers_shorter) as server:
        judge = tmp_path / "judge.yaml"
        judge.write_text(yaml.safe_dump({"base_url": server.url, "model": "scripted"}))
        recipe = write(benchmarks=["pairwise"], judge="./judge.yaml", against="stage:dpo")
        code, _, err = run("compare", recipe, "--seeds", 2)
        assert code == 0, err
        report = json.loads(Path("runs/toy/report/comparison.json").read_text())
        rows = {row["name"]: row for row in report["results"]}
        assert "pairwise/win_rate" not in rows["scorer"]["metrics"]
        assert rows["dpo"]["metrics"]["pairwise/win_rate"] == 50.0
        for name in ("initial", "reverse", "policy"):
            own = [expected(Path(f"runs/toy/seed-{k}/report"), name) for k in range(2)]
            assert rows[name]["metrics"]["pairwise/win_rate"] == pytest.approx(sum(own) / 2)
            assert [rows[name]["per_seed"][f"seed-{k}"]["pairwise/win_rate"] for k in range(2)] == pytest.approx(own)
            assert rows[name]["errors"]["pairwise/win_rate"] >= 0
        assert any("Judge: scripted at 127.0.0.1" in note for note in report["judged"])
        assert "win rate" in Path("runs/toy/report/comparison.md").read_text()
        asked = len(server.requests)
        assert asked > 0
        monkeypatch.setattr(LoadedModel, "sample", None)
        assert run("compare", recipe, "--seeds", 2)[0] == 0
        assert len(server.requests) == asked
        assert json.loads(Path("runs/toy/report/comparison.json").read_text())["results"] == report["results"]


def test_without_its_judge_a_run_is_trained_and_measured_and_says_what_is_missing(
    run: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    with JudgeServer(prefers_shorter) as server:
        judge = tmp_path / "judge.yaml"
        judge.write_text(yaml.safe_dump({"base_url": server.url, "model": "scripted", "attempts": 2}))
        recipe = write(benchmarks=["pairwise"], judge="./judge.yaml", against="stage:dpo")
        server.faults = {1: "die"}
        code, _, err = run("train", recipe)
        assert code == 4
        assert "the same command goes on" in err
        report = json.loads(Path("runs/toy/report/comparison.json").read_text())
        assert {"kl", "kl_initial"} <= report["results"][1]["metrics"].keys()
        assert "is not judged yet" in report["judged"][0]
        server.revive()
        server.faults = {}
        code, out, err = run("train", recipe)
        assert code == 0, err
        assert out.count("finished and unchanged, skipped") == 4
        report = json.loads(Path("runs/toy/report/comparison.json").read_text())
        assert "pairwise/win_rate" in report["results"][1]["metrics"]
        assert "is not judged yet" not in " ".join(report["judged"])


def test_a_reward_model_of_the_same_recipe_can_judge(run: Run, write: Callable[..., Path]) -> None:
    recipe = write(benchmarks=["pairwise"], judge="stage:scorer", against="stage:dpo")
    code, _, err = run("train", recipe)
    assert code == 0, err
    report = json.loads(Path("runs/toy/report/comparison.json").read_text())
    assert report["results"][1]["metrics"]["pairwise/win_rate"] == 50.0
    assert any("the reward model runs/toy/scorer/final (" in note for note in report["judged"])


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"benchmarks": ["pairwise"]}, "report.benchmarks: say in `judge` who judges"),
        ({"benchmarks": ["pairwise"], "judge": "gold"}, "say in `against` whose answers `pairwise` compares with"),
        ({"benchmarks": ["mt_bench"], "judge": "gold", "against": "stage:dpo"}, "report.against: only `pairwise`"),
        ({"judge": "gold"}, "report.judge: there is nothing to judge"),
        ({"judge_repeats": 3}, "report.judge_repeats: there is nothing to judge"),
        ({"benchmarks": ["pairwise", "pairwise"], "judge": "gold", "against": "stage:dpo"}, "named twice"),
        ({"benchmarks": ["alpaca"], "judge": "gold"}, "report.benchmarks"),
        (
            {"benchmarks": ["pairwise"], "judge": "golt", "against": "stage:dpo"},
            "judge: there is no judge `golt`",
        ),
        (
            {"benchmarks": ["pairwise"], "judge": "gold", "against": "stage:dpu"},
            "against: no stage is named `dpu`",
        ),
        ({"benchmarks": ["pairwise"], "judge": "gold", "against": "./none"}, "report.against"),
        ({"benchmarks": ["pairwise"], "judge": "stage:dpo", "against": "stage:dpo"}, "has no scalar head"),
        ({"benchmarks": ["mt_bench"], "judge": "gold"}, "report.judge: the judge gold only says which of two answers"),
        ({"benchmarks": ["arena_hard"], "judge": "gold", "benchmark_files": "."}, "report.benchmarks: --data-dir"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_trained(
    run: Run, write: Callable[..., Path], report: dict[str, Any], sentence: str
) -> None:
    code, _, err = run("train", write(**report))
    assert code == 2, err
    assert sentence in err
    assert not Path("runs").exists()


def test_benchmarks_of_an_extended_recipe_can_be_left_out(run: Run, write: Callable[..., Path]) -> None:
    recipe = write(benchmarks=["pairwise"], judge="gold", against="stage:dpo")
    assert run("train", recipe, "--set", "report.benchmarks=[]")[0] == 0
    report = json.loads(Path("runs/toy/report/comparison.json").read_text())
    assert "pairwise/win_rate" not in report["results"][1]["metrics"]
    assert report["judged"] == []
