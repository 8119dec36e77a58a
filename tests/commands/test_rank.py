"""`aligndistil evaluate` of rewards on RewardBench 2, and of a judge beside people, from planted files to the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from support.judge_server import JudgeServer
from support.recipes import three_stages

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, command_line: Evaluate, tmp_path: Path) -> Evaluate:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return command_line


def table() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(Path("evaluation/comparison.json").read_text())["results"]}


def reward_rows() -> list[dict[str, Any]]:
    def row(name: str, subset: str, right: list[str], wrong: list[str]) -> dict[str, Any]:
        answers = {"chosen": right, "rejected": wrong, "num_correct": len(right)}
        return {"id": name, "prompt": "w01", "subset": subset, **answers}

    rows = [
        row(str(i), subset, [f"w{10 + 4 * i}"], [f"w{11 + 4 * i}", f"w{12 + 4 * i} w02", f"w{13 + 4 * i}"])
        for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
        for i in range(4)
    ]
    return [*rows, row("ref:0", "Ties", ["w40"], ["w41"]), row("tied:0", "Ties", ["w42", "w43"], ["w44"])]


def test_a_reward_model_on_reward_bench(evaluate: Evaluate, model_folder: Callable[..., str], tmp_path: Path) -> None:
    rows, path = reward_rows(), model_folder(seed=4, scalar=True)
    (tmp_path / "reward_bench_2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = evaluate("evaluate", path, "-b", "reward_bench_2", "--data-dir", ".")
    assert code == 0, err
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def score(text: str) -> float:
        ids = tokenizer(f"<user> w01 <bot> {text} <eos>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids).logits[0, 0].detach())

    best = [score(row["chosen"][0]) > max(map(score, row["rejected"])) for row in rows[:4]]
    (found,) = table().values()
    for subset in ("factuality", "precise_if", "math", "safety", "focus"):  # the same four rows in each
        assert found["metrics"][f"reward_bench_2/{subset}"] == pytest.approx(100 * sum(best) / 4)
    six = [found["metrics"][f"reward_bench_2/{name}"] for name in ("factuality", "precise_if", "math", "safety")]
    six += [found["metrics"]["reward_bench_2/focus"], found["metrics"]["reward_bench_2/ties"]]
    assert found["metrics"]["reward_bench_2/score"] == pytest.approx(sum(six) / 6)
    assert "the mean of its six subsets" in out
    lines = Path("evaluation/reward_bench_2").glob("*.jsonl")
    written = [json.loads(line) for line in next(lines).read_text().splitlines()]
    assert [len(row["scores"]) for row in written] == [4] * 20 + [2, 3]
    assert written[0]["scores"][0] == pytest.approx(score(rows[0]["chosen"][0]), abs=1e-5)


def test_every_reward_of_a_run_is_a_row(
    evaluate: Evaluate,
    recipe_file: Callable[..., Path],
    model_folder: Callable[..., str],
    pairs_file: Callable[..., str],
    tmp_path: Path,
) -> None:
    content = three_stages(model_folder(seed=0), pairs_file(10)) | {"train": {"max_steps": 1, "batch_size": 2}}
    assert evaluate("train", recipe_file(content), "--stage", "policy")[0] == 0
    text = "".join(json.dumps(row) + "\n" for row in reward_rows())
    (tmp_path / "reward_bench_2.jsonl").write_text(text)
    code, _, err = evaluate("evaluate", "runs/toy", "-b", "reward_bench_2", "--data-dir", ".")
    assert code == 0, err
    names = set(table())
    assert "dpo / reverse" in names
    assert {name.split(" / ")[0] for name in names} == {"dpo", "reverse"}


def test_a_judge_beside_people(evaluate: Evaluate, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pairs = [(model, i) for model in "abcd" for i in range(6)]
    people = [
        {
            "instruction": f"{model} {i}",
            "output_1": f"first {model} {i}",
            "output_2": f"second {model} {i}",
            "annotator_index": person,
            "datasplit": "eval",
            "preference": 2 if i < "abcd".index(model) + 1 else 1,
        }
        for person in range(4)
        for model, i in pairs
    ]
    (tmp_path / "alpaca_farm_human_crossannotations.json").write_text(json.dumps(people))
    models = [{**row, "generator": str(row["instruction"])[0]} for row in people if row["annotator_index"] == 0]
    (tmp_path / "alpaca_farm_human_annotations.json").write_text(json.dumps(models))
    majority = {str(row["instruction"]): row["preference"] for row in people}

    def reply(request: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """What most people prefer, but of every model's last pair."""
        text = request["messages"][-1]["content"]
        name = next(name for name in majority if f'"{name}"' in text)
        second_first = text.index(f"second {name}") < text.index(f"first {name}")
        prefers_second = (majority[name] == 2) != name.endswith("5")
        return ("m", {"m": 0.0}) if prefers_second == second_first else ("M", {"M": 0.0})

    with JudgeServer(reply) as server:
        judge = tmp_path / "judge.yaml"
        settings = {"base_url": server.url, "model": "scripted", "price": {"input": 1000.0}}
        judge.write_text(yaml.safe_dump(settings))
        code, out, err = evaluate("evaluate", "-b", "human_agreement", "--judge", judge, "--data-dir", ".")
        assert code == 0, err
        assert len(server.answered) == 24 * 2 * 2
        words = sum(len(m["content"].split()) for request in server.answered for m in request["messages"])
    found = table()["scripted"]["metrics"]
    assert found["human_agreement/agreement"] == pytest.approx(100 * 20 / 24)
    assert found["human_agreement/repeat_spread"] == 0
    assert found["human_agreement/price"] == pytest.approx(1000 * (words * 1000 / 1e6) / (24 * 2))
    assert table()["humans"]["metrics"]["human_agreement/agreement"] == 100
    published = table()["alpaca_eval_gpt4 (published)"]["metrics"]
    assert round(published["human_agreement/agreement"], 2) == 69.17  # the paper's Table 4
    assert "in both orders (weighted)" in out
