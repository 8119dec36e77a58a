"""Win rates on prompts of one's own, with numbers worked out by hand; and the judges that score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndistil.benchmarks.base import Answer, JudgedAnswers, Question
from aligndistil.benchmarks.judges import gold_judge, judge_config, open_judge, reward_scores
from aligndistil.benchmarks.pairwise import Pairwise, questions_of
from aligndistil.data import read_prompts
from aligndistil.data.reviews import gold_reward
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.judge import Ask, Reply, Unreadable
from aligndistil.models import load_scalar_model, load_tokenizer
from aligndistil.recipe import Model, Source

ALONE = Processes(0, 1, torch.device("cpu"))
QUESTIONS = [Question(str(i), (f"question {i}",)) for i in range(3)]
THEIRS = {str(i): Answer((f"their answer {i}",)) for i in range(3)}
OURS = {str(i): Answer((f"our answer {i}",)) for i in range(3)}
# By question: the preference for the answer shown first, with the baseline's first and with the model's first.
VERDICTS = {
    "0/baseline-first": 0.0,
    "0/model-first": 1.0,  # ours is better, twice
    "1/baseline-first": 1.0,
    "1/model-first": 1.0,  # whichever is first
    "2/baseline-first": 0.5,
    "2/model-first": 0.0,  # a tie, and theirs
}


def scored(verdicts: dict[str, float]) -> dict[str, list[float]]:
    judged = JudgedAnswers(OURS, dict(verdicts))
    values = Pairwise(QUESTIONS, THEIRS, "theirs").scores({"ours": judged})["ours"]
    return {metric: of_questions.tolist() for metric, of_questions in values.items()}


def test_the_numbers_by_hand() -> None:
    assert scored(VERDICTS) == {
        "win_rate": [100.0, 50.0, 25.0],
        "tie_rate": [0.0, 0.0, 50.0],
        "position_bias": [0.0, 50.0, -25.0],
    }


def test_a_missing_verdict_leaves_its_question_out() -> None:
    left = scored({key: value for key, value in VERDICTS.items() if key != "1/model-first"})
    for values in left.values():
        assert np.isnan(values).tolist() == [False, True, False]
    assert left["win_rate"][2] == 25.0


def test_the_judge_is_shown_both_orders_and_the_whole_conversation() -> None:
    opening = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"})
    question = Question("q", ("what now?",), opening)
    asks = Pairwise([question], {"q": Answer(("THEIRS",))}, "theirs").asks({"q": Answer(("OURS",))})
    assert [ask.key for ask in asks] == ["q/baseline-first", "q/model-first"]
    shown = [ask.messages[-1]["content"] for ask in asks]
    for text in shown:
        assert all(part in text for part in ("be brief", "hello", "what now?"))
    assert shown[0].index("THEIRS") < shown[0].index("OURS")
    assert shown[1].index("OURS") < shown[1].index("THEIRS")
    compared = [ask.compared for ask in asks if ask.compared is not None]
    assert [(pair.first, pair.second) for pair in compared] == [("THEIRS", "OURS"), ("OURS", "THEIRS")]
    assert [turn["content"] for turn in compared[0].prompt] == ["be brief", "hello", "what now?"]


@pytest.mark.parametrize(
    ("text", "preference"),
    [("A is right.\n[[A]]", 1.0), ("[[B]]", 0.0), ("both: [[tie]]", 0.5), ("[[A]] and again [[A]]", 1.0)],
)
def test_a_verdict_is_read(text: str, preference: float) -> None:
    ask = Pairwise(QUESTIONS, THEIRS, "theirs").asks(OURS)[0]
    assert ask.read(Reply(text)) == preference


@pytest.mark.parametrize("text", ["", "A", "[[A]] or [[B]]", "[[C]]"])
def test_what_is_no_verdict_is_not_read(text: str) -> None:
    ask = Pairwise(QUESTIONS, THEIRS, "theirs").asks(OURS)[0]
    with pytest.raises(Unreadable):
        ask.read(Reply(text))


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    benchmark = Pairwise(QUESTIONS, THEIRS, "theirs")
    path = benchmark.write_answers(tmp_path, "ours", OURS)
    assert benchmark.read_answers(path) == OURS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_prompt = tmp_path / "elsewhere.jsonl"
    lines = [json.dumps({"prompt": row["prompt"][-1]["content"], "response": row["response"]}) for row in rows[::-1]]
    by_prompt.write_text("\n".join(lines))
    assert benchmark.read_answers(by_prompt) == OURS
    by_prompt.write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match="1 of 3 questions have no answer in it, 0 for one"):
        benchmark.read_answers(by_prompt)
    by_prompt.write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"elsewhere\.jsonl: answer 1 has no `response`"):
        benchmark.read_answers(by_prompt)


def test_prompts_of_any_layout_are_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows: list[dict[str, object]] = [{"prompt": talk}, {"prompt": talk[:1]}, {"prompt": talk}, {"prompt": talk[2:]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = questions_of(read_prompts(Source(path=str(path))), None, 0.5)
    assert [(q.id, q.turns, len(q.opening), q.temperature) for q in questions] == [
        ("0", ("c",), 2, 0.5),
        ("1", ("a",), 0, 0.5),
        ("2", ("c",), 0, 0.5),
    ]
    assert len(questions_of(read_prompts(Source(path=str(path))), 2, 0.5)) == 2


def test_the_gold_judge_prefers_the_higher_reward() -> None:
    good, bad = "A wonderful and brilliant film.", "A terrible and boring film."
    assert gold_reward(good) > gold_reward(bad)
    answers = {"0": Answer((good,)), "1": Answer((bad,)), "2": Answer((good,))}
    benchmark = Pairwise(QUESTIONS, {"0": Answer((bad,)), "1": Answer((good,)), "2": Answer((good,))}, "theirs")
    judged = gold_judge().ask(benchmark.asks(answers), 2, "test")
    assert judged.verdicts[0] == judged.verdicts[1]
    values = benchmark.scores({"ours": JudgedAnswers(answers, judged.verdicts[0])})["ours"]
    assert values["win_rate"].tolist() == [100.0, 0.0, 50.0]
    assert values["position_bias"].tolist() == [0.0, 0.0, 0.0]


def test_a_judge_that_scores_refuses_ratings() -> None:
    rating = Ask("1/turn-1", [{"role": "user", "content": "rate"}], lambda reply: 1.0, max_tokens=1)
    with pytest.raises(UserError, match="mt_bench: the judge gold only says which of two answers is better"):
        gold_judge().ask([rating], 1, "mt_bench")


def test_a_reward_model_judges_by_the_score_at_the_last_token(model_folder: Callable[..., str]) -> None:
    path = model_folder(seed=4, scalar=True)
    responses = [([{"role": "user", "content": "w01"}], text) for text in ("w02 w03", "w04", "", "w05 w06 w07")]
    found = reward_scores(path, Model(path=path), responses, ALONE, batch_size=2)
    tokenizer = load_tokenizer(path, Model(path=path))
    model = ScalarModel(load_scalar_model(path, Model(path=path), trained=False)).network.model
    for (_, text), score in zip(responses, found, strict=True):
        if not text:
            assert score == -np.inf
            continue
        ids = tokenizer(f"<user> w01 <bot> {text} <eos>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert score == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_who_judges_is_found_by_name_file_or_folder(model_folder: Callable[..., str], tmp_path: Path) -> None:
    assert judge_config("gold").gold
    assert judge_config("qwen2.5-72b-instruct").model == "Qwen/Qwen2.5-72B-Instruct"
    folder = model_folder(seed=4, scalar=True)
    assert judge_config(folder).reward_model == folder
    judge = open_judge(judge_config(folder), ALONE, 4)
    assert (judge.name, judge.scores_only) == (folder, True)
    with pytest.raises(UserError, match="no judge `golt`; did you mean `gold`"):
        judge_config("golt")
