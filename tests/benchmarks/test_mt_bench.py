"""MT-Bench asks what FastChat asks, on the benchmark's own files, and its means are those of FastChat's table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from aligndistil.benchmarks.base import Answer, JudgedAnswers, ratio_values
from aligndistil.benchmarks.files import Files
from aligndistil.benchmarks.mt_bench import MTBench
from aligndistil.errors import UserError
from aligndistil.judge import Reply, Unreadable, Verdict
from aligndistil.report.statistics import estimate

STORE = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not (STORE / "mt_bench_questions.jsonl.gz").exists(), reason="the files of MT-Bench are not beside the repository"
)


@pytest.fixture
def benchmark() -> MTBench:
    files = Files(STORE)
    benchmark = MTBench(files)
    assert files.notes == []  # the pinned editions
    return benchmark


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((STORE / f"{name}.jsonl.gz").read_bytes()).splitlines()]


def answers_of(benchmark: MTBench, text: str = "") -> dict[str, Answer]:
    return {q.id: Answer((f"{text}first {q.id}", f"{text}second {q.id}")) for q in benchmark.questions}


def test_the_judge_reads_what_fastchat_sends(benchmark: MTBench) -> None:
    answers = answers_of(benchmark, "braces {question_2} {0} {} }{ ")
    prompts = {line["name"]: line for line in lines_of("mt_bench_judge_prompts")}
    references = {line["question_id"]: line["choices"][0]["turns"] for line in lines_of("mt_bench_reference_gpt4")}
    asks = {ask.key: ask for ask in benchmark.asks(answers)}
    assert len(asks) == 160
    for line in lines_of("mt_bench_questions"):
        id, category, (question_1, question_2) = line["question_id"], line["category"], line["turns"]
        name = "single-math-v1" if category in ("math", "reasoning", "coding") else "single-v1"
        answer_1, answer_2 = answers[str(id)].turns
        values = dict(zip(("ref_answer_1", "ref_answer_2"), references.get(id, ()), strict=False))
        for key, prompt, of_turn in (
            ("turn-1", prompts[name], {"question": question_1, "answer": answer_1}),
            (
                "turn-2",
                prompts[f"{name}-multi-turn"],
                {"question_1": question_1, "question_2": question_2, "answer_1": answer_1, "answer_2": answer_2},
            ),
        ):
            ask = asks[f"{id}/{key}"]
            user = prompt["prompt_template"].format(**values, **of_turn)
            assert ask.messages == [
                {"role": "system", "content": prompt["system_prompt"]},
                {"role": "user", "content": user},
            ]
            assert (ask.temperature, ask.max_tokens, ask.compared) == (0.0, 2048, None)
            assert ask.reminder


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[7.5]], not [[3]]", 7.5),
        ("as [1] says ... [[9]]", 9.0),
        ("Rating: [8]", 8.0),
        ("[[10]]", 10.0),
        ("Rating: 8", None),
        ("[[8/10]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
    ],
)
def test_the_first_rating_from_1_to_10_counts(benchmark: MTBench, text: str, rating: float | None) -> None:
    ask = benchmark.asks(answers_of(benchmark))[0]
    if rating is None:
        with pytest.raises(Unreadable):
            ask.read(Reply(text))
    else:
        assert ask.read(Reply(text)) == rating


def test_each_category_is_decoded_as_in_fastchat(benchmark: MTBench) -> None:
    assert {q.category: q.temperature for q in benchmark.questions} == {
        "writing": 0.7,
        "roleplay": 0.7,
        "reasoning": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "extraction": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }


def test_a_limit_is_shared_out_among_the_categories() -> None:
    """The file has ten questions of each category, one category after the other, from 81 on."""
    limited = MTBench(Files(STORE), limit=10)
    assert [q.id for q in limited.questions] == ["81", "82", "91", "92", "101", "111", "121", "131", "141", "151"]
    assert len({q.category for q in limited.questions}) == 8
    assert "evenly" in limited.notes[0]


def verdicts_of(ratings: dict[str, tuple[float | None, float | None]]) -> dict[str, Verdict]:
    turns = {f"{id}/turn-{turn}": value for id, both in ratings.items() for turn, value in enumerate(both, 1)}
    return {key: value for key, value in turns.items() if value is not None}


def test_means_are_over_the_ratings_that_there_are() -> None:
    """8, 6, 9, 1 and 2 are five ratings of three questions: 26 / 5, and 5.2 + (14 - 2 x 5.2) x 3 / 5 of the first."""
    benchmark = MTBench(Files(STORE), limit=4)
    ratings = {"81": (8.0, 6.0), "91": (9.0, None), "101": (None, None), "111": (1.0, 2.0)}
    scores = benchmark.scores({"m": JudgedAnswers(answers_of(benchmark), verdicts_of(ratings))})["m"]
    assert list(scores) == list(MTBench.metrics) == ["average", "turn_1", "turn_2"]
    np.testing.assert_allclose(scores["average"], [7.36, 7.48, np.nan, 0.76])
    np.testing.assert_array_equal(scores["turn_1"], [8, 9, np.nan, 1])
    np.testing.assert_array_equal(scores["turn_2"], [6, np.nan, np.nan, 2])


def test_with_all_ratings_a_question_is_the_mean_of_its_turns(benchmark: MTBench) -> None:
    drawn = np.random.default_rng(0).integers(1, 11, (80, 2)).astype(float)
    ratings = {q.id: (float(a), float(b)) for q, (a, b) in zip(benchmark.questions, drawn, strict=True)}
    scores = benchmark.scores({"m": JudgedAnswers(answers_of(benchmark), verdicts_of(ratings))})["m"]
    np.testing.assert_allclose(scores["average"], drawn.mean(axis=1))


def test_the_error_of_a_ratio_is_the_jackknife_s() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5, 400).astype(float)
    sums = counts * rng.uniform(0, 1, 400) + 0.3 * counts**2
    without = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = np.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    found = estimate(ratio_values(sums, counts))
    assert found.mean == pytest.approx(sums.sum() / counts.sum())
    assert found.error == pytest.approx(jackknife, rel=0.01)


def test_fastchat_makes_the_same_table_of_the_files(tmp_path: Path) -> None:
    """By the steps of its show_result.py: drop -1, then means by model, over each turn and over all."""
    benchmark = MTBench(Files(STORE), limit=3)
    answers = answers_of(benchmark, "an answer\u2028of two lines ")
    asks = benchmark.asks(answers)
    texts = {ask.key: f"I say {ask.key}" for ask in asks}
    first = JudgedAnswers(answers, verdicts_of({"81": (1.0, 1.0), "91": (1.0, 1.0), "101": (1.0, 1.0)}))
    judged = {
        "a": JudgedAnswers(answers, verdicts_of({"81": (8.0, 6.5), "91": (9.0, None), "101": (4.0, 5.0)})),
        "b": JudgedAnswers(answers, verdicts_of({"81": (2.0, 3.0), "91": (None, 7.0), "101": (10.0, 1.0)})),
    }
    benchmark.write_verdicts(tmp_path, "a", "judge", asks, first, texts)  # of an earlier run
    for model, one in judged.items():
        path = benchmark.write_verdicts(tmp_path, model, "judge", asks, one, texts)
    assert path == tmp_path / "model_judgment" / "judge_single.jsonl"
    table = pd.read_json(path, lines=True)
    assert len(table) == 12
    assert table["judge"][4] == ["judge", "single-math-v1"]  # of question 101
    assert table["question_id"].tolist() == [81, 81, 91, 91, 101, 101] * 2
    assert table["judgment"][0] == "I say 81/turn-1"
    assert table["user_prompt"].tolist() == [ask.messages[1]["content"] for ask in asks] * 2
    rated = table[table["score"] != -1]
    for model, scores in benchmark.scores(judged).items():
        of_model = rated[rated["model"] == model]
        assert of_model["score"].mean() == pytest.approx(np.nanmean(scores["average"]))
        assert of_model[of_model["turn"] == 1]["score"].mean() == pytest.approx(np.nanmean(scores["turn_1"]))
        assert of_model[of_model["turn"] == 2]["score"].mean() == pytest.approx(np.nanmean(scores["turn_2"]))


def test_answers_are_read_as_they_were_written(benchmark: MTBench, tmp_path: Path) -> None:
    answers = answers_of(benchmark, "é\u2028\n")
    path = benchmark.write_answers(tmp_path, "model", answers)
    assert path == tmp_path / "model_answer" / "model.jsonl"
    assert benchmark.read_answers(path) == answers
    limited = MTBench(Files(STORE), limit=2)
    assert limited.read_answers(path) == {id: answers[id] for id in ("81", "91")}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert benchmark.read_answers(path) == answers  # U+2028 ends no line
    line = lines[0]
    assert {*line} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (line["question_id"], line["model_id"]) == (81, "model")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"question_id": 7}, "has no question '7'"),
        ({"choices": [{"turns": ["only one"]}]}, "question 81 is not two turns of text"),
        ({"choices": [{"turns": ["one", None]}]}, "question 81 is not two turns of text"),
        ({"choices": []}, "no `choices` with `turns`"),
        (None, r"1 of the 80 questions of MT-Bench have no answer \(81\)"),
        ("[]", ":1: this is no JSON object"),
    ],
)
def test_other_answers_are_refused(benchmark: MTBench, changed: Any, sentence: str, tmp_path: Path) -> None:
    path = benchmark.write_answers(tmp_path, "model", answers_of(benchmark))
    first, *rest = path.read_text().split("\n")
    if isinstance(changed, dict):
        changed = json.dumps({**json.loads(first), **changed})
    path.write_text("\n".join([changed or "", *rest]))
    with pytest.raises(UserError, match=sentence):
        benchmark.read_answers(path)
    with pytest.raises(UserError, match="cannot be read"):
        benchmark.read_answers(tmp_path / "none.jsonl")


def test_files_that_lack_a_part_of_it_are_refused(tmp_path: Path) -> None:
    for name in ("mt_bench_questions", "mt_bench_judge_prompts"):
        (tmp_path / f"{name}.jsonl.gz").symlink_to(STORE / f"{name}.jsonl.gz")
    references = lines_of("mt_bench_reference_gpt4")[1:]
    (tmp_path / "mt_bench_reference_gpt4.jsonl").write_text("\n".join(map(json.dumps, references)))
    with pytest.raises(UserError, match=r"not those of MT-Bench \('101'\)"):
        MTBench(Files(tmp_path))
