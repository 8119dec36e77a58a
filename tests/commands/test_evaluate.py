"""`aligndistil evaluate`, end to end on the benchmarks' own files, with a judge whose verdicts are known."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aligndistil.judge import client
from aligndistil.rollout import LoadedModel
from support.benchmark_files import ARENA_JUDGE, STORE, Script, rows
from support.judge_server import JudgeServer, every

needs_files = pytest.mark.skipif(
    not (STORE / "mt_bench_questions.jsonl.gz").exists(), reason="the benchmarks' files are not beside the repository"
)
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, command_line: Evaluate, tmp_path: Path) -> Evaluate:
    """`aligndistil evaluate`, in an empty folder and with pauses of no length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return functools.partial(command_line, "evaluate")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for path in STORE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "arena_hard_judge_config.yaml").write_text(yaml.safe_dump(ARENA_JUDGE))
    return folder


def judge_file(tmp_path: Path, url: str, **settings: Any) -> Path:
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump({"base_url": url, "model": "scripted", "timeout": 1.0, **settings}))
    return path


def metrics(out: str = "evaluation") -> dict[str, dict[str, float]]:
    results = json.loads(Path(out, "comparison.json").read_text())["results"]
    return {row["name"]: row["metrics"] for row in results}


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(Script(6)) as running:
        yield running


@needs_files
def test_three_benchmarks_of_one_judge(
    evaluate: Evaluate, data_dir: Path, server: JudgeServer, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    judge = judge_file(tmp_path, server.url, price={"input": 1.0, "output": 2.0})
    asked = ["--limit", 6, "--data-dir", data_dir, "--max-new-tokens", 8, "--judge", judge]
    for name in ("alpaca_eval", "mt_bench", "arena_hard"):
        asked += ["--benchmark", name]
    code, out, err = evaluate(f"mine={model_folder(seed=1)}", f"other={model_folder(seed=2)}", *asked)
    assert code == 0, err
    found = metrics()["mine"]
    # 0.9 in both orders, 0.1 in both, and 0.9 for what is first: half of it.
    assert found["alpaca_eval/win_rate"] == pytest.approx(100 * (2 * 0.9 + 2 * 0.1 + 2 * 0.5) / 6)
    assert found["alpaca_eval/position_bias"] == pytest.approx(100 * 2 * 0.4 / 6)
    assert "alpaca_eval/lc_win_rate" not in found
    # By question: won by A>B and B>>A (1 and 3 points), lost by the same, or first: A>B and A>B.
    assert found["arena_hard/win_rate"] == pytest.approx(100 * (2 * 4 + 0 + 2 * 1) / (4 * 4 + 2 * 2))
    assert found["arena_hard/position_bias"] == pytest.approx(100 * 2 * 0.5 / 6)
    # The first question of the first six categories: numbers 0, 10, ... 50 of the file, in both turns.
    assert [found[f"mt_bench/{metric}"] for metric in ("turn_1", "turn_2", "average")] == [1.0, 1.0, 1.0]
    assert found["alpaca_eval/repeat_spread"] == found["arena_hard/repeat_spread"] == 0.0
    assert metrics()["other"]["alpaca_eval/win_rate"] == found["alpaca_eval/win_rate"]
    # Two models, two repeats, two orders or turns, six questions, three benchmarks.
    assert len(server.answered) == 2 * 2 * 2 * 6 * 3
    for said in ("a part of its own (not comparable", "asked 2 times, in both orders", "scripted at 127.0.0.1"):
        assert said in out
    assert "arena_hard_judge_config.yaml is not the pinned edition" in Path("evaluation/comparison.md").read_text()
    # The standard error over questions, by hand: 90, 90, 10, 10, 50, 50.
    row = json.loads(Path("evaluation/comparison.json").read_text())["results"][0]
    spread = math.sqrt(sum((value - 50) ** 2 for value in (90, 90, 10, 10, 50, 50)) / 5 / 6)
    assert row["errors"]["alpaca_eval/win_rate"] == pytest.approx(spread)
    assert row["intervals"]["alpaca_eval/win_rate"][0] == pytest.approx(50 - 2.570581835636314 * spread)  # t, 5 df
    for said in ("MT-Bench", "Arena-Hard", "2971e34", "FastChat", "were cut at 8 tokens", "is not known here"):
        assert said in out
    outputs = json.loads(Path("evaluation/alpaca_eval/mine/model_outputs.json").read_text())
    assert [row["generator"] for row in outputs] == ["mine"] * 6
    answers = Path("evaluation/mt_bench/model_answer/mine.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["choices"][0]["turns"]) for line in answers] == [2] * 6
    assert len(Path("evaluation/arena_hard/repeat-1/model_judgment/scripted/mine.jsonl").read_text().splitlines()) == 6
    before = Path("evaluation/comparison.json").read_bytes()
    code, _, err = evaluate(f"mine={model_folder(seed=1)}", f"other={model_folder(seed=2)}", *asked)
    assert code == 0, err
    assert len(server.answered) == 2 * 2 * 2 * 6 * 3  # nothing is asked again
    assert Path("evaluation/comparison.json").read_bytes() == before


@needs_files
def test_after_faults_the_table_is_that_of_a_quiet_run(
    evaluate: Evaluate, data_dir: Path, server: JudgeServer, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    asked = [f"mine={model_folder(seed=1)}", "--limit", 6, "--data-dir", data_dir, "--max-new-tokens", 8]
    for name in ("alpaca_eval", "mt_bench", "arena_hard"):
        asked += ["--benchmark", name]
    judge = judge_file(tmp_path, server.url, attempts=4)
    assert evaluate(*asked, "--judge", judge, "--out", "quiet")[0] == 0
    quiet = len(server.answered)
    with JudgeServer(Script(6)) as failing:
        failing.faults = every(9, 429, 500, "nonsense", "no choices", "half json", "hang") | {40: "die"}
        judge = judge_file(tmp_path, failing.url, attempts=4, concurrency=4)
        code, _, err = evaluate(*asked, "--judge", judge)
        assert code == 4
        assert "the same command goes on from them" in err
        there = len(failing.answered)
        failing.revive()
        failing.faults = {number: fault for number, fault in failing.faults.items() if fault != "die"}
        code, _, err = evaluate(*asked, "--judge", judge)
        assert code == 0, err
        assert there < quiet == len(failing.answered)  # every question as often as it was asked for, and no more
    assert metrics() == metrics("quiet")


@needs_files
def test_a_verdict_that_never_comes_is_no_score(
    evaluate: Evaluate, data_dir: Path, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    asked = [f"mine={model_folder(seed=1)}", "--limit", 4, "--data-dir", data_dir, "--max-new-tokens", 8]
    asked += ["--benchmark", "mt_bench", "--repeat", 1]
    first = rows("mt_bench_questions")[0]["turns"][0]

    def reply(request: dict[str, Any]) -> str:
        return "no rating" if first in request["messages"][1]["content"] else "[[4]]"

    with JudgeServer(reply) as server:
        judge = judge_file(tmp_path, server.url, attempts=2)
        code, _, err = evaluate(*asked, "--judge", judge)
        assert code == 4
        assert "2 questions to the judge have no verdict (81/turn-1 on mine, for one: no verdict in 2 attempts" in err
        assert not Path("evaluation/comparison.json").exists()
        code, out, err = evaluate(*asked, "--judge", judge, "--allow-missing")
        assert code == 0, err
        assert "have no verdict" in out
        assert metrics()["mine"]["mt_bench/average"] == 4.0


@needs_files
def test_answers_alone_and_answers_made_elsewhere(
    evaluate: Evaluate,
    data_dir: Path,
    server: JudgeServer,
    model_folder: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["--limit", 6, "--data-dir", data_dir, "--benchmark", "arena_hard"]
    code, out, err = evaluate(f"mine={model_folder(seed=1)}", *asked, "--max-new-tokens", 8, "--answers-only")
    assert code == 0, err
    assert "answers evaluation/arena_hard/" in out
    assert not server.requests
    monkeypatch.setattr(LoadedModel, "sample", None)
    judge = judge_file(tmp_path, server.url)
    answers = "evaluation/arena_hard/model_answer/mine.jsonl"
    assert evaluate(*asked, "--answers", f"mine={answers}", "--judge", judge, "--out", "elsewhere")[0] == 0
    assert evaluate(f"mine={model_folder(seed=1)}", *asked, "--max-new-tokens", 8, "--judge", judge)[0] == 0
    assert metrics() == metrics("elsewhere")


def test_a_win_rate_with_the_gold_judge(evaluate: Evaluate) -> None:
    asked = ["--against", "base=builtin:tiny", "--prompts", "builtin:reviews#test", "--limit", 8, "--judge", "gold"]
    code, out, err = evaluate("greedy=builtin:tiny", *asked, "--max-new-tokens", 24, "--temperature", 0)
    assert code == 0, err
    found = metrics()["greedy"]
    assert found == {"pairwise/win_rate": 50.0, "pairwise/tie_rate": 100.0}
    code, out, err = evaluate("drawn=builtin:tiny", *asked, "--seed", 1, "--max-new-tokens", 24)
    assert code == 0, err
    lines = Path("evaluation/pairwise/judgments/gold/drawn.jsonl").read_text().splitlines()
    preferred = [json.loads(line) for line in lines]
    wins = [line["preference"] if line["order"] == "model-first" else 1 - line["preference"] for line in preferred]
    assert metrics()["drawn"]["pairwise/win_rate"] == pytest.approx(100 * np.mean(wins))
    assert "the gold reward of builtin:reviews" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["builtin:tiny"], "say what to evaluate on: --benchmark alpaca_eval, mt_bench, arena_hard"),
        (["builtin:tiny", "-b", "alpaca_evil"], "no such benchmark; did you mean `alpaca_eval`?"),
        (["builtin:tiny", "-b", "mt_bench"], "say who judges (--judge JUDGE.yaml), or give --answers-only"),
        (["builtin:tiny", "-b", "mt_bench", "--judge", "gold", "--answers-only"], "say who judges"),
        (["builtin:tiny", "-b", "pairwise", "--judge", "gold"], "say whose answers they are compared with"),
        (["builtin:tiny", "--against", "builtin:tiny", "--judge", "gold"], "say what the models are asked: --prompts"),
        (["-b", "mt_bench", "--judge", "gold"], "give a model to evaluate"),
        (["nowhere/at/all", "-b", "mt_bench", "--judge", "gold"], "'nowhere/at/all' does not exist"),
        (["a=builtin:tiny", "a=builtin:tiny", "-b", "mt_bench", "--judge", "gold"], "two models would be called a"),
        (["builtin:tiny", "-b", "mt_bench", "--judge", "golt"], "no judge `golt`; did you mean `gold`?"),
        (["builtin:tiny", "-b", "mt_bench", "--judge", "gold", "--data-dir", "."], "has no mt_bench_questions.jsonl"),
        (["builtin:tiny", "-b", "reward_bench_2", "--judge", "gold"], "reward_bench_2 does not read --judge"),
        (["builtin:tiny", "-b", "reward_bench_2", "-b", "mt_bench"], "has a table of its own"),
        (["-b", "human_agreement"], "is of a judge: give --judge, and no model"),
        (
            ["--answers", "none.jsonl", "-b", "mt_bench", "--judge", "gold"],
            "--answers none.jsonl: there is no such file",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
    evaluate: Evaluate, arguments: list[str], sentence: str
) -> None:
    code, _, err = evaluate(*arguments)
    assert code == 2, err
    assert sentence in err
    assert err.count("error:") == 1
    assert not Path("evaluation/comparison.json").exists()


def test_a_judge_that_says_something_else_the_second_time_is_seen(
    evaluate: Evaluate, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    """Both orders of three prompts, asked twice: first always for the model, then always for what is first."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w0{i}"}) + "\n" for i in range(3)))
    asked = [f"mine={model_folder(seed=1)}", "--against", f"base={model_folder(seed=2)}", "--prompts", "prompts.jsonl"]
    asked += ["--max-new-tokens", 6]
    seen: dict[str, int] = {}

    assert evaluate(*asked, "--answers-only")[0] == 0
    lines = Path("evaluation/pairwise/answers/mine.jsonl").read_text().splitlines()
    answers = [json.loads(line)["response"] for line in lines]

    def first_time(request: dict[str, Any]) -> str:
        text = request["messages"][1]["content"]
        seen[text] = seen.get(text, 0) + 1
        if seen[text] == 2:
            return "[[A]]"
        return "[[A]]" if any(f"<answer A>\n{answer}\n" in text for answer in answers) else "[[B]]"

    with JudgeServer(first_time) as server:
        code, _, err = evaluate(*asked, "--judge", judge_file(tmp_path, server.url, concurrency=1))
    assert code == 0, err
    assert metrics()["mine"]["pairwise/win_rate"] == pytest.approx(75)  # 100 and 50
    assert metrics()["mine"]["pairwise/repeat_spread"] == pytest.approx(50)
    assert metrics()["mine"]["pairwise/position_bias"] == pytest.approx(25)


def test_another_judge_or_another_baseline_is_not_the_table_of_before(
    evaluate: Evaluate, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w0{i}"}) + "\n" for i in range(4)))
    models = [f"mine={model_folder(seed=1)}", "--prompts", "prompts.jsonl", "--max-new-tokens", 6]

    def longest(request: dict[str, Any]) -> str:
        parts = [request["messages"][1]["content"].split(f"answer {name}>\n")[1].split("\n</")[0] for name in "AB"]
        a, b = map(len, parts)
        return "[[A]]" if a > b else "[[B]]" if b > a else "[[tie]]"

    with JudgeServer(longest) as server, JudgeServer(lambda request: "[[tie]]") as other:
        judge = judge_file(tmp_path, server.url)
        assert evaluate(*models, "--against", f"base={model_folder(seed=2)}", "--judge", judge)[0] == 0
        before = metrics()
        assert evaluate(*models, "--against", f"base={model_folder(seed=3)}", "--judge", judge)[0] == 0
        assert len(server.answered) > 16  # the other model's answers are judged anew
        judge = judge_file(tmp_path, other.url)
        assert evaluate(*models, "--against", f"base={model_folder(seed=2)}", "--judge", judge)[0] == 0
        assert len(other.answered) == 16
        assert metrics()["mine"]["pairwise/win_rate"] == 50.0
        judge = judge_file(tmp_path, server.url)
        requests = len(server.requests)
        assert evaluate(*models, "--against", f"base={model_folder(seed=2)}", "--judge", judge)[0] == 0
        assert metrics() == before
        assert len(server.requests) == requests  # all of it was in the cache


def test_another_model_at_the_same_place_answers_anew(
    evaluate: Evaluate, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    asked = ["mine=model", "--against", "builtin:tiny", "--prompts", "prompts.jsonl", "--max-new-tokens", 6]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w01"}\n{"prompt": "w02"}\n')
    found = []
    for seed in (1, 2):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(model_folder(seed=seed), place)
        assert evaluate(*asked, "--judge", "gold")[0] == 0
        found.append(Path("evaluation/pairwise/answers/mine.jsonl").read_text())
    config = json.loads((place / "tokenizer_config.json").read_text())
    template = place / "chat_template.jinja"
    if template.exists():
        template.write_text(template.read_text().replace("<user> ", "<user> w05 "))
    else:
        config["chat_template"] = config["chat_template"].replace("<user> ", "<user> w05 ")
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    assert evaluate(*asked, "--judge", "gold")[0] == 0
    found.append(Path("evaluation/pairwise/answers/mine.jsonl").read_text())
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (["a b=builtin:tiny", "a/b=builtin:tiny"], "would both be called a--b"),
        (["gpt-4-0314=builtin:tiny"], "would be called gpt-4-0314, as the baseline of Arena-Hard"),
        (["SCALAR"], "which writes no text; give a language model"),
    ],
)
@needs_files
def test_models_that_cannot_be_told_apart_or_asked_are_refused_before_the_first_answers(
    evaluate: Evaluate, data_dir: Path, model_folder: Callable[..., str], models: list[str], sentence: str
) -> None:
    models = [model_folder(seed=4, scalar=True) if model == "SCALAR" else model for model in models]
    code, _, err = evaluate(*models, "-b", "arena_hard", "--data-dir", data_dir, "--judge", "gold", "--limit", 2)
    assert code == 2, err
    assert sentence in err
    assert not any(Path("evaluation").rglob("*.jsonl"))


@needs_files
def test_a_model_that_was_trained_on_the_questions_gets_no_score_unless_it_is_allowed(
    evaluate: Evaluate,
    recipe_file: Callable[..., Path],
    model_folder: Callable[..., str],
    data_dir: Path,
    command_line: Evaluate,
) -> None:
    questions = [row["turns"][0] for row in rows("mt_bench_questions")]
    pairs = Path("pairs.jsonl")
    pairs.write_text(
        "".join(json.dumps({"prompt": q, "chosen": "w01 w02", "rejected": "w03"}) + "\n" for q in questions[:16])
    )
    content = {
        "name": "met",
        "model": {"path": model_folder(seed=0)},
        "data": {"train": {"path": "pairs.jsonl"}, "eval": {"path": "pairs.jsonl"}, "max_prompt_length": 64},
        "train": {"max_steps": 1, "batch_size": 2},
        "engine": {"zero_stage": 0},
        "report": {"samples": 2},
        "stages": {"dpo": {"objective": {"name": "dpo"}, "models": {"reference": model_folder(seed=0)}}},
    }
    recipe = recipe_file(content)
    assert command_line("train", recipe)[0] == 0
    asked = ["runs/met/dpo", "-b", "mt_bench", "--data-dir", data_dir, "--max-new-tokens", 4]
    with JudgeServer(lambda request: "[[5]]") as server:
        judge = judge_file(Path.cwd(), server.url)
        code, _, err = evaluate(*asked, "--judge", judge)
        assert code == 2
        assert "met/dpo was trained on 16 of the 80 questions of MT-Bench" in err
        assert not server.requests
        code, _, err = evaluate(*asked, "--judge", judge, "--allow-contaminated", "--repeat", 1)
        assert code == 0, err
        assert "scored because of --allow-contaminated" in Path("evaluation/comparison.md").read_text()
        content["report"] = {"samples": 2, "benchmarks": ["mt_bench"], "judge": str(judge)}
        content["report"]["benchmark_files"] = str(data_dir)
        content["name"] = "again"
        code, _, err = command_line("train", recipe_file(content, "again.yaml"))
        assert code == 2
        assert "report.benchmarks: again was trained on 16 of the 80 questions of MT-Bench" in err
        assert not Path("runs/again").exists()
