"""Arena-Hard's win rates are those of the fits that they stand for, with the style of real answers."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import optimize
from scipy.special import expit, logit

from aligndistil.benchmarks.arena_hard import ArenaHard, style_controlled
from aligndistil.benchmarks.base import Answer, JudgedAnswers
from aligndistil.benchmarks.files import Files
from aligndistil.errors import UserError
from aligndistil.judge import Reply, Unreadable
from aligndistil.report.statistics import estimate

tiktoken = pytest.importorskip("tiktoken")

STORE = Path(__file__).parents[3] / "shared" / "data"
QUESTIONS, BASELINE = "arena_hard_questions.jsonl", "arena_hard_answers_gpt-4-0314.jsonl"
GPT_35, GPT_4 = "gpt-3.5-turbo-0125", "gpt-4-0613"
LABELS = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
JUDGE = {
    "system_prompt": "Which answer is better? End with a label.",
    "prompt_template": ["Asked: {question_1}\nA says: {answer_1}\nB says: {answer_2}"],
    "regex_pattern": r"\[\[([AB<>=]+)\]\]",
}

pytestmark = pytest.mark.skipif(
    not (STORE / f"{QUESTIONS}.gz").exists(), reason="the files of Arena-Hard are not beside the repository"
)


@pytest.fixture(scope="module", autouse=True)
def without_a_vocabulary() -> Iterator[None]:
    """Lengths are characters / 4, whether there is a network or not."""

    def fails(name: str) -> None:
        raise ConnectionError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", fails)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `--data-dir` with the benchmark's own files, and the prompt of another judge."""
    path = tmp_path_factory.mktemp("arena_hard")
    for name in (QUESTIONS, BASELINE):
        (path / f"{name}.gz").symlink_to(STORE / f"{name}.gz")
    (path / "arena_hard_judge_config.yaml").write_text(yaml.safe_dump(JUDGE))
    return path


@pytest.fixture(scope="module")
def benchmark(folder: Path) -> ArenaHard:
    files = Files(folder)
    benchmark = ArenaHard(files)
    assert len(files.notes) == 1  # questions and baseline are pinned editions
    assert "judge_config" in files.notes[0]
    return benchmark


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((STORE / f"{name}.gz").read_bytes()).split(b"\n") if line]


def texts_of(name: str) -> dict[str, str]:
    lines = lines_of(f"arena_hard_answers_{name}.jsonl")
    return {line["uid"]: line["messages"][-1]["content"]["answer"] for line in lines}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Answer]]:
    return {name: {id: Answer((text,)) for id, text in texts_of(name).items()} for name in (GPT_35, GPT_4)}


def mean(values: Any) -> float:
    return float(np.nanmean(values))


def test_the_baseline_is_first_and_then_second(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]], folder: Path
) -> None:
    ids = [line["uid"] for line in lines_of(QUESTIONS)]
    own = answers[GPT_35] | {ids[1]: Answer(("braces {answer_1} {0} {}",))}
    asks = benchmark.asks(own)
    assert [ask.key for ask in asks] == [f"{id}/game-{game}" for id in ids for game in (1, 2)]
    baseline = texts_of("gpt-4-0314")[ids[1]]
    prompt = lines_of(QUESTIONS)[1]["prompt"]
    for ask, (first, second) in zip(
        asks[2:4], ((baseline, own[ids[1]].turns[0]), (own[ids[1]].turns[0], baseline)), strict=True
    ):
        user = f"Asked: {prompt}\nA says: {first}\nB says: {second}"
        assert ask.messages == [
            {"role": "system", "content": JUDGE["system_prompt"]},
            {"role": "user", "content": user},
        ]
        assert ask.compared == ([{"role": "user", "content": prompt}], first, second)
        assert (ask.temperature, ask.max_tokens) == (0.0, 4096)
        assert [ask.of_preference(preference) for preference in (1.0, 0.5, 0.0)] == ["A>B", "A=B", "B>A"]
    assert [q.id for q in ArenaHard(Files(folder), limit=2).questions] == ids[:2]


@pytest.mark.parametrize("label", LABELS)
def test_a_verdict_is_one_label(benchmark: ArenaHard, answers: dict[str, dict[str, Answer]], label: str) -> None:
    ask = benchmark.asks(answers[GPT_4])[0]
    assert ask.read(Reply(f"I think [[{label}]].\nSo: [[{label}]]")) == label
    other = "A>B" if label != "A>B" else "A>>B"
    for text in (label, f"[[{label}]] or [[{other}]]", "[[A]]", "[[A<B]]", ""):
        with pytest.raises(Unreadable):
            ask.read(Reply(text))
    assert ask.reminder


def test_the_numbers_of_three_questions(folder: Path, answers: dict[str, dict[str, Answer]]) -> None:
    """The model wins 4 of 4 comparisons, 1.5 of 2 and 0 of 1; the answer that is shown first 1, 1.5 and 1 of five."""
    benchmark = ArenaHard(Files(folder), limit=3)
    games = [("B>>A", "A>B"), ("A=B", "A>B"), ("A>B", None)]
    verdicts = {
        f"{q.id}/game-{i}": label
        for q, both in zip(benchmark.questions, games, strict=True)
        for i, label in enumerate(both, 1)
        if label is not None
    }
    scores = benchmark.scores({"m": JudgedAnswers(answers[GPT_35], verdicts)})["m"]
    assert list(scores) == list(ArenaHard.metrics)
    rate = 5.5 / 7
    by_hand = [100 * (rate + (won - n * rate) * 3 / 7) for won, n in ((4, 4), (1.5, 2), (0, 1))]
    np.testing.assert_allclose(scores["win_rate"], by_hand)
    assert mean(scores["win_rate"]) == pytest.approx(100 * rate)
    np.testing.assert_allclose(
        scores["position_bias"], [100 * (0.2 + (s - n * 0.2) * 3 / 5) for s, n in ((0, 2), (0.5, 2), (0.5, 1))]
    )
    assert mean(scores["position_bias"]) == pytest.approx(20)
    texts = [answers[GPT_35][q.id].turns[0] for q in benchmark.questions]
    assert scores["length"].tolist() == [round(len(text) / 4) for text in texts]
    none = benchmark.scores({"m": JudgedAnswers(answers[GPT_35], {})})["m"]
    assert all(np.isnan(values).all() for name, values in none.items() if name != "length")


def verdicts_at_random(benchmark: ArenaHard, seed: int, share: Sequence[float]) -> dict[str, str]:
    """The shares are of LABELS as if the model were A; every twentieth verdict is missing."""
    rng = np.random.default_rng(seed)
    found = {}
    for question in benchmark.questions:
        for game, labels in ((1, LABELS[::-1]), (2, LABELS)):
            if rng.random() > 0.05:
                found[f"{question.id}/game-{game}"] = str(rng.choice(labels, p=share))
    return found


def judged_at_random(benchmark: ArenaHard, answers: Mapping[str, Mapping[str, Answer]]) -> dict[str, JudgedAnswers]:
    return {
        GPT_35: JudgedAnswers(answers[GPT_35], verdicts_at_random(benchmark, 0, [0.1, 0.2, 0.2, 0.3, 0.2])),
        GPT_4: JudgedAnswers(answers[GPT_4], verdicts_at_random(benchmark, 1, [0.2, 0.3, 0.2, 0.2, 0.1])),
    }


def plain_win_rates(
    benchmark: ArenaHard, judged: Mapping[str, JudgedAnswers], style: bool, without: str = ""
) -> list[float]:
    """In percent, of a regression on a row for each time that a comparison counts, and twice each."""
    rows, differences, won = [], [], []
    for m, one in enumerate(judged.values()):
        for key, label in one.verdicts.items():
            id, game = key.split("/game-")
            if id == without:
                continue
            assert isinstance(label, str)
            model, baseline = ("B", "A") if game == "1" else ("A", "B")
            result = (1, 1) if label.replace(">>", ">") == f"{model}>{baseline}" else (0, 0)
            result = (1, 0) if "=" in label else result
            row = np.zeros(1 + len(judged))
            row[0], row[1 + m] = -math.log(10), math.log(10)
            own = benchmark._style(one.answers[id])
            other = benchmark._style(benchmark._baseline[id])
            for _ in range(3 if ">>" in label else 1):
                for outcome in result:
                    rows.append(row)
                    differences.append([(a - b) / (a + b + 1) for a, b in zip(own, other, strict=True)])
                    won.append(outcome)
    x, d, y = np.array(rows), np.array(differences), np.array(won)
    if style:
        spread = d.std(axis=0)  # 0 where no answer to the first questions has a header
        x = np.hstack([x, (d - d.mean(axis=0)) / np.where(spread == 0, 1, spread)])

    def loss(beta: Any) -> tuple[float, Any]:
        eta = x @ beta
        penalty = 0.5 * float(style)
        value = penalty * beta @ beta + np.logaddexp(0, eta).sum() - y @ eta
        return float(value), 2 * penalty * beta + x.T @ (expit(eta) - y)

    beta = optimize.minimize(
        loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-8}
    ).x
    return [100 / (1 + 10 ** (beta[0] - beta[1 + m])) for m in range(len(judged))]


def test_the_win_rate_is_that_of_the_bradley_terry_fit(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]]
) -> None:
    judged = judged_at_random(benchmark, answers)
    scores = benchmark.scores(judged)
    fitted = plain_win_rates(benchmark, judged, style=False)
    assert [mean(scores[name]["win_rate"]) for name in judged] == pytest.approx(fitted, abs=1e-4)
    assert fitted[1] - fitted[0] > 10


def test_style_control_is_a_regression_on_all_comparisons(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]]
) -> None:
    judged = judged_at_random(benchmark, answers)
    scores = benchmark.scores(judged)
    fitted = plain_win_rates(benchmark, judged, style=True)
    assert [mean(scores[name]["style_controlled_win_rate"]) for name in judged] == pytest.approx(fitted, abs=1e-4)
    alone = benchmark.scores({GPT_4: judged[GPT_4]})[GPT_4]["style_controlled_win_rate"]
    [fitted_alone] = plain_win_rates(benchmark, {GPT_4: judged[GPT_4]}, style=True)
    assert mean(alone) == pytest.approx(fitted_alone, abs=1e-4)
    assert abs(fitted_alone - fitted[1]) > 0.01


def test_its_values_are_the_jackknife_s(folder: Path, answers: dict[str, dict[str, Answer]]) -> None:
    benchmark = ArenaHard(Files(folder), limit=40)
    judged = judged_at_random(benchmark, answers)
    whole = plain_win_rates(benchmark, judged, style=True)
    without = np.array([plain_win_rates(benchmark, judged, style=True, without=q.id) for q in benchmark.questions])
    scores = benchmark.scores(judged)
    for m, name in enumerate(judged):
        values = scores[name]["style_controlled_win_rate"]
        np.testing.assert_allclose(values, whole[m] + 39 * (without[:, m].mean() - without[:, m]), atol=1e-2)
        variance = 39 / 40 * ((without[:, m] - without[:, m].mean()) ** 2).sum()
        assert estimate(values).error == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_a_preference_for_long_answers_is_taken_out(benchmark: ArenaHard) -> None:
    """A judge that likes `short` better at equal length, but long answers far better than short ones.

    Which of the two is better than the baseline turns round. Alone, a model's own length stays in its win rate.
    """
    real, more, baseline = texts_of(GPT_4), texts_of(GPT_35), texts_of("gpt-4-0314")
    models = {
        "short": {id: Answer((text[: len(text) // 2],)) for id, text in real.items()},
        "long": {id: Answer((f"{text}\n{more[id]}",)) for id, text in real.items()},
    }
    true = {"short": 60.0, "long": 40.0}
    own = np.array(
        [[round(len(of_model[q.id].turns[0]) / 4) for q in benchmark.questions] for of_model in models.values()]
    )
    other = np.array([round(len(baseline[q.id]) / 4) for q in benchmark.questions])
    difference = (own - other) / (own + other + 1)
    z = (difference - difference.mean()) / difference.std()
    rng = np.random.default_rng(0)
    judged = {}
    for (name, of_model), of_z in zip(models.items(), z, strict=True):
        wins = rng.random((2, 500)) < expit(logit(true[name] / 100) + 1.0 * of_z)
        verdicts = {}
        for q, question in enumerate(benchmark.questions):
            verdicts[f"{question.id}/game-1"] = "B>A" if wins[0, q] else "A>B"
            verdicts[f"{question.id}/game-2"] = "A>B" if wins[1, q] else "B>A"
        judged[name] = JudgedAnswers(of_model, verdicts)
    scores = benchmark.scores(judged)
    for name, of_model in scores.items():
        controlled = estimate(of_model["style_controlled_win_rate"])
        assert controlled.error is not None
        assert abs(controlled.mean - true[name]) < 3 * controlled.error
        assert abs(mean(of_model["win_rate"]) - true[name]) > 10
        alone = benchmark.scores({name: judged[name]})[name]
        assert mean(alone["style_controlled_win_rate"]) == pytest.approx(mean(alone["win_rate"]), abs=3)
    assert mean(scores["short"]["win_rate"]) < mean(scores["long"]["win_rate"])


def test_the_note_says_what_was_fitted_together(folder: Path, answers: dict[str, dict[str, Answer]]) -> None:
    benchmark = ArenaHard(Files(folder), limit=3)
    judged = judged_at_random(benchmark, answers)
    [length] = benchmark.notes
    benchmark.scores(judged)
    assert benchmark.notes[0] == length
    assert f"one fit of `{GPT_35}` and `{GPT_4}`; they" in benchmark.notes[1]
    benchmark.scores({GPT_4: judged[GPT_4]})
    assert len(benchmark.notes) == 2
    assert f"one fit of `{GPT_4}`; it is at this model's own mean" in benchmark.notes[1]


def test_a_model_without_a_verdict_has_no_win_rate() -> None:
    wins, styles = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), np.zeros((2, 3, 1))
    values = style_controlled(wins, np.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), styles)
    assert np.isfinite(values).tolist() == [[True, True, False], [False, False, False]]
    assert np.isfinite(style_controlled(wins[:, :1], np.array([[2.0], [0.0]]), styles[:, :1])).tolist() == [
        [True],
        [False],
    ]


def test_a_style_that_all_share_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    wins, counts = rng.integers(0, 3, (2, 20)).astype(float), np.full((2, 20), 2.0)
    styles = rng.normal(size=(2, 20, 1))
    same = np.concatenate([styles, np.full((2, 20, 1), 0.3)], axis=-1)
    np.testing.assert_allclose(style_controlled(wins, counts, same), style_controlled(wins, counts, styles), atol=1e-6)


def test_both_layouts_of_the_files_are_read(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]], folder: Path, tmp_path: Path
) -> None:
    questions = [
        {"question_id": line["uid"], "category": "arena-hard-v0.1", "turns": [{"content": line["prompt"]}]}
        for line in lines_of(QUESTIONS)
    ]
    (tmp_path / QUESTIONS).write_text("\n".join(map(json.dumps, questions)))
    for name, to in (("gpt-4-0314", BASELINE), (GPT_4, "old.jsonl")):
        lines = [
            {"question_id": id, "model_id": name, "choices": [{"index": 0, "turns": [{"content": text}]}]}
            for id, text in texts_of(name).items()
        ]
        (tmp_path / to).write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "arena_hard_judge_config.yaml").symlink_to(folder / "arena_hard_judge_config.yaml")
    old = ArenaHard(Files(tmp_path))
    assert old.questions == benchmark.questions
    assert old.read_answers(tmp_path / "old.jsonl") == answers[GPT_4]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines_of(f"arena_hard_answers_{GPT_4}.jsonl"))))
    assert benchmark.read_answers(tmp_path / "new.jsonl") == answers[GPT_4]
    both = [[(ask.key, ask.messages) for ask in one.asks(answers[GPT_4])] for one in (old, benchmark)]
    assert both[0] == both[1]


STYLED = """# One
##  Two
####### seven
#none
 - a
12. b
* c **d** __e__ **f
g**
```
# in code **too**
- x
```
"""


def test_answers_are_written_with_their_style(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]], tmp_path: Path
) -> None:
    first = benchmark.questions[0].id
    own = answers[GPT_35] | {first: Answer((STYLED,))}
    path = benchmark.write_answers(tmp_path, "model", own)
    assert path == tmp_path / "model_answer" / "model.jsonl"
    assert benchmark.read_answers(path) == own
    line = json.loads(path.read_text().split("\n")[0])
    assert {*line} == {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
    assert line["conv_metadata"] == {
        "token_len": round(len(STYLED) / 4),
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }
    baseline = [json.loads(line) for line in (tmp_path / "model_answer" / "gpt-4-0314.jsonl").open()]
    texts = texts_of("gpt-4-0314")
    assert [line["conv_metadata"]["token_len"] for line in baseline] == [
        round(len(texts[q.id]) / 4) for q in benchmark.questions
    ]


def test_verdicts_are_written_game_by_game(folder: Path, answers: dict[str, dict[str, Answer]], tmp_path: Path) -> None:
    benchmark = ArenaHard(Files(folder), limit=1)
    [id] = [q.id for q in benchmark.questions]
    asks = benchmark.asks(answers[GPT_4])
    judged = JudgedAnswers(answers[GPT_4], {f"{id}/game-2": "A>>B"})
    path = benchmark.write_verdicts(tmp_path, GPT_4, "judge", asks, judged, {f"{id}/game-2": "By far [[A>>B]]"})
    assert path == tmp_path / "model_judgment" / "judge" / f"{GPT_4}.jsonl"
    assert [json.loads(line) for line in path.open()] == [
        {
            "question_id": id,
            "model": GPT_4,
            "judge": "judge",
            "games": [
                {"user_prompt": asks[0].messages[1]["content"], "judgment": "", "score": None},
                {"user_prompt": asks[1].messages[1]["content"], "judgment": "By far [[A>>B]]", "score": "A>>B"},
            ],
        }
    ]


def test_lengths_are_tokens_where_there_is_a_vocabulary(
    folder: Path, answers: dict[str, dict[str, Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Words:
        def encode(self, text: str, disallowed_special: tuple[str, ...]) -> list[str]:
            assert disallowed_special == ()  # `<|endoftext|>` in an answer is text
            return text.split()

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"cl100k_base": Words()}[name])
    benchmark = ArenaHard(Files(folder), limit=3)
    scores = benchmark.scores({GPT_4: JudgedAnswers(answers[GPT_4], {})})[GPT_4]
    assert scores["length"].tolist() == [len(answers[GPT_4][q.id].turns[0].split()) for q in benchmark.questions]
    assert "tokens of tiktoken's cl100k_base" in benchmark.notes[0]


def test_other_files_are_refused(
    benchmark: ArenaHard, answers: dict[str, dict[str, Answer]], folder: Path, tmp_path: Path
) -> None:
    for name in (f"{QUESTIONS}.gz", f"{BASELINE}.gz", "arena_hard_judge_config.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    path = benchmark.write_answers(tmp_path, "model", answers[GPT_4])
    first, *rest = path.read_text().split("\n")
    for changed, sentence in (
        ("", "1 of the 500 questions of Arena-Hard have no answer"),
        (json.dumps({**json.loads(first), "question_id": "other"}), "has no question 'other'"),
        ('{"uid": "x"}', "answer 1 has no `question_id` and `choices`"),
    ):
        path.write_text("\n".join([changed, *rest]))
        with pytest.raises(UserError, match=sentence):
            benchmark.read_answers(path)
    for name, content, sentence in (
        (
            "arena_hard_judge_config.yaml",
            yaml.safe_dump({**JUDGE, "regex_pattern": "(("}),
            "judge_config.yaml is not that",
        ),
        ("arena_hard_judge_config.yaml", "system_prompt: a", "judge_config.yaml is not that"),
        (QUESTIONS, "\n".join(map(json.dumps, lines_of(QUESTIONS)[1:])), "it has 499 questions, not 500"),
        (QUESTIONS, '{"uid": "x"}', "questions.jsonl is not that of Arena-Hard"),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=sentence):
            ArenaHard(Files(tmp_path))
