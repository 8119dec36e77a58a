"""AlpacaEval's figures are those of its package, on made-up questions; no verdict is dropped or read twice."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from aligndistil.benchmarks.alpaca_eval import BASELINE, GAMED, AlpacaEval, package
from aligndistil.benchmarks.base import Answer, JudgedAnswers
from aligndistil.benchmarks.files import Files
from aligndistil.errors import MissingError, UserError
from aligndistil.judge import Reply, Unreadable

pytestmark = pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="alpaca-eval is not installed")

STORE = Path(__file__).parents[3] / "shared" / "data"
N = 805
RNG = np.random.default_rng(0)
ROWS = [
    {"dataset": "made up", "instruction": f"Say {i}.", "output": "b" * int(length), "generator": "gpt4_1106_preview"}
    for i, length in enumerate(RNG.integers(50, 600, N))
]
ROWS[3]["instruction"] = "Write {output_1} and {instruction} in braces. "
LENGTHS = np.array([len(row["output"]) for row in ROWS]) + RNG.integers(-40, 400, N)
ANSWERS = {str(i): Answer(("m" * int(length),)) for i, length in enumerate(LENGTHS)}
QUALITY = RNG.uniform(0.2, 1, N)
DIFFICULTY = RNG.normal(size=N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `--data-dir` of made-up questions, and of a baseline that is told to be brief or long."""
    path = tmp_path_factory.mktemp("alpaca_eval")
    (path / BASELINE.name).write_text(json.dumps(ROWS))
    gamed = [
        pd.DataFrame(
            {
                "model": f"gpt4_1106_preview_{name}",
                "index": range(N),
                "preference": expit(-np.tanh(delta) + 0.3 * DIFFICULTY),
                "std_delta_len": delta,
                "instruction_difficulty": DIFFICULTY,
                "not_gamed_baseline": False,
            }
        )
        for name, delta in (("concise", RNG.normal(0.5, 0.3, N)), ("verbose", RNG.normal(-0.5, 0.3, N)))
    ]
    pd.concat(gamed).to_csv(path / GAMED.name, index=False)
    return path


@pytest.fixture(scope="module")
def benchmark(folder: Path) -> AlpacaEval:
    return AlpacaEval(Files(folder))


def judged(preference: np.ndarray, first: float = 0.0, answers: Mapping[str, Answer] = ANSWERS) -> JudgedAnswers:
    """Verdicts of a judge that prefers the model's answers so much, and the answer shown first by `first` more."""
    verdicts: dict[str, float] = {}
    for i, p in enumerate(preference):
        if not np.isnan(p):
            verdicts |= {f"{i}/baseline-first": 1 - p + first, f"{i}/model-first": p + first}
    return JudgedAnswers(answers, verdicts)


def annotations(preference: np.ndarray) -> pd.DataFrame:
    """What the package's own programs would be given."""
    return pd.DataFrame(
        {
            "instruction": [row["instruction"] for row in ROWS],
            "output_1": [row["output"] for row in ROWS],
            "output_2": [ANSWERS[str(i)].turns[0] for i in range(N)],
            "generator_1": "gpt4_1106_preview",
            "generator_2": "mine",
            "annotator": "judge",
            "preference": 1 + preference,
        }
    )


@pytest.fixture
def official(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """The package's length-controlled win rate, with our file in the place of what it would fetch."""
    glm = package("metrics.glm_winrate")
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: folder / GAMED.name)

    def win_rate(rows: object) -> dict[str, float]:
        with glm.sklearn.config_context():
            found: dict[str, float] = glm.get_length_controlled_winrate(rows, save_weights_dir=None)
            return found

    return win_rate


WITH_GAPS = np.where(np.arange(N) % 9 == 4, np.nan, QUALITY)


@pytest.mark.parametrize("preference", [QUALITY, WITH_GAPS], ids=["all", "some missing"])
def test_both_win_rates_and_their_errors_are_the_package_s(
    preference: np.ndarray, benchmark: AlpacaEval, official: Callable[..., dict[str, float]]
) -> None:
    expected = official(annotations(preference))
    values = benchmark.scores({"mine": judged(preference)})["mine"]
    assert list(values) == list(benchmark.metrics)
    win_rate = values["win_rate"][~np.isnan(values["win_rate"])]
    assert win_rate.mean() == pytest.approx(expected["win_rate"]) == pytest.approx(100 * np.nanmean(preference))
    assert win_rate.std(ddof=1) / len(win_rate) ** 0.5 == pytest.approx(expected["standard_error"])
    controlled = values["lc_win_rate"]
    assert controlled.shape == (N,)
    assert controlled.mean() == pytest.approx(expected["length_controlled_winrate"], rel=1e-12)
    assert controlled.std(ddof=1) / N**0.5 == pytest.approx(expected["lc_standard_error"], rel=1e-9)
    assert values["length"].mean() == pytest.approx(LENGTHS.mean())


def test_a_question_without_a_verdict_keeps_its_row(
    benchmark: AlpacaEval, official: Callable[..., dict[str, float]]
) -> None:
    """Without the row, each later question would be given the difficulty of another."""
    preference = expit(QUALITY + 2 * DIFFICULTY)
    preference[:200] = np.nan
    ours = benchmark.scores({"mine": judged(preference)})["mine"]["lc_win_rate"].mean()
    rows = annotations(preference)
    shifted = official(rows[rows["preference"].notna()].to_dict("records"))["length_controlled_winrate"]
    assert ours == pytest.approx(official(rows)["length_controlled_winrate"], rel=1e-12)
    assert abs(ours - shifted) > 0.5


def test_a_judge_that_likes_length_is_seen_through(benchmark: AlpacaEval) -> None:
    delta = LENGTHS - np.array([len(row["output"]) for row in ROWS])
    of_length = expit(2 * np.tanh(delta / delta.std()))
    values = benchmark.scores({"long": judged(of_length), "even": judged(np.full(N, 0.5))})
    win_rates = {name: found["win_rate"].mean() for name, found in values.items()}
    controlled = {name: found["lc_win_rate"].mean() for name, found in values.items()}
    assert win_rates["long"] > 75
    assert win_rates["even"] == 50
    assert controlled["long"] == pytest.approx(50, abs=5)
    assert controlled["even"] == pytest.approx(50, abs=5)


def test_position_bias_by_hand(folder: Path) -> None:
    short = AlpacaEval(Files(folder), limit=3)
    assert len(short.questions) == 3
    verdicts = {
        "0/baseline-first": 0.9,  # the model is preferred by 0.1 here and by 0.6 below: 0.35
        "0/model-first": 0.6,  # first by 0.4 and 0.1: 0.25
        "1/baseline-first": 0.0,
        "1/model-first": 1.0,
        "2/model-first": 1.0,
    }
    values = short.scores({"mine": JudgedAnswers(ANSWERS, verdicts)})["mine"]
    assert values["win_rate"] == pytest.approx([35, 100, np.nan], nan_ok=True)
    assert values["position_bias"] == pytest.approx([25, 0, np.nan], nan_ok=True)
    assert list(values) == ["win_rate", "position_bias", "length"]
    assert "805" in short.notes[0]


def test_what_leans_to_the_first_answer_cancels(benchmark: AlpacaEval) -> None:
    values = benchmark.scores({"mine": judged(np.full(N, 0.4), first=0.2)})["mine"]
    assert values["win_rate"] == pytest.approx(np.full(N, 40))
    assert values["position_bias"] == pytest.approx(np.full(N, 20))


def test_the_baseline_against_itself_is_even_and_nobody_is_asked(benchmark: AlpacaEval) -> None:
    same = {str(i): Answer((row["output"],)) for i, row in enumerate(ROWS)}
    assert benchmark.asks(same) == []
    values = benchmark.scores({"copy": JudgedAnswers(same, {})})["copy"]
    assert values["win_rate"].tolist() == values["lc_win_rate"].tolist() == [50.0] * N
    assert len(benchmark.asks({**same, "7": Answer(("else",))})) == 2


def test_without_any_verdict_there_is_no_win_rate(benchmark: AlpacaEval) -> None:
    values = benchmark.scores({"mine": JudgedAnswers(ANSWERS, {})})["mine"]
    assert np.isnan(values["win_rate"]).all()
    assert np.isnan(values["lc_win_rate"]).all()


@pytest.mark.parametrize("reading", ["weighted", "ranking"])
def test_a_judge_reads_what_the_package_would_show_it(folder: Path, reading: str) -> None:
    short = AlpacaEval(Files(folder), limit=4, reading=reading)
    asks = {ask.key: ask for ask in short.asks(ANSWERS)}
    assert list(asks) == [f"{i}/{order}" for i in range(4) for order in ("baseline-first", "model-first")]
    utils, settings = package("utils"), asks["2/model-first"]
    config = {"weighted": "weighted_alpaca_eval_gpt4_turbo", "ranking": "alpaca_eval_gpt4"}[reading]
    evaluators = Path(package("constants").EVALUATORS_CONFIG_DIR)
    official = utils.load_configs(evaluators / config / "configs.yaml")[config]
    kwargs = official["completions_kwargs"]
    assert settings.max_tokens == kwargs["max_tokens"]
    assert settings.temperature == kwargs["temperature"]
    assert settings.top_logprobs == kwargs.get("top_logprobs", 0)
    model, baseline = ANSWERS["2"].turns[0], ROWS[2]["output"]
    frame = pd.DataFrame([{"instruction": ROWS[2]["instruction"], "output_1": model, "output_2": baseline}])
    [prompt], _ = utils.make_prompts(frame, (evaluators / official["prompt_template"]).read_text())
    assert settings.messages == utils.prompt_to_chatml(prompt)
    assert settings.compared is not None
    assert (settings.compared.first, settings.compared.second) == (model, baseline)
    # What looks like a place to fill stays in an instruction.
    [shown] = [turn["content"] for turn in asks["3/model-first"].messages if turn["role"] == "user"]
    assert ROWS[3]["instruction"] in shown


def test_the_weighted_verdict_is_the_probability_of_the_first_answer(folder: Path) -> None:
    read = AlpacaEval(Files(folder), limit=1).asks(ANSWERS)[0].read
    # 0.6 of 0.6 + 0.2
    assert read(Reply("m", {"m": np.log(0.6), "M": np.log(0.2), " m": np.log(0.1)})) == pytest.approx(0.75)
    assert read(Reply("M", {"M": -0.1, "The": -3.0})) == 0.0
    assert read(Reply("x", {"m": -900.0, "M": -900.0})) == pytest.approx(0.5)
    with pytest.raises(Unreadable, match="neither"):
        read(Reply("m", {" m": -0.1, "The": -3.0}))
    [of_package] = package("completion_parsers").logprob_parser(
        {
            "logprobs": {
                "content": [{"top_logprobs": [{"token": "m", "logprob": -0.7}, {"token": "M", "logprob": -0.9}]}]
            }
        },
        numerator_token="m",
        denominator_tokens=["m", "M"],
        is_binarize=False,
    )
    assert 2 - read(Reply("m", {"m": -0.7, "M": -0.9})) == pytest.approx(of_package)


def test_the_ranking_verdict_is_the_rank_of_the_first_answer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = AlpacaEval(Files(folder), limit=1, reading="ranking").asks(ANSWERS)[0].read
    assert read(Reply("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]")) == 1.0
    assert read(Reply("[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]")) == 0.0
    for text in ("", "Model 1 is better.", "[{'model': 'model_1', 'rank': 3}]", "[{'model': 'model_2', 'rank': 1}]"):
        with pytest.raises(Unreadable):
            read(Reply(text))
    assert caplog.records == []


def test_what_the_package_changes_for_the_process_is_put_back(benchmark: AlpacaEval) -> None:
    glm = package("metrics.glm_winrate")
    download = glm.hf_hub_download
    benchmark.scores({"mine": judged(QUALITY)})
    assert glm.hf_hub_download is download
    assert not glm.sklearn.get_config()["enable_metadata_routing"]
    assert logging.getLogger("aligndistil").isEnabledFor(logging.WARNING)


def test_without_the_file_for_it_the_other_figures_are_there_and_a_note(folder: Path, tmp_path: Path) -> None:
    (tmp_path / BASELINE.name).write_text((folder / BASELINE.name).read_text())
    benchmark = AlpacaEval(Files(tmp_path))
    assert list(benchmark.scores({"mine": judged(QUALITY)})["mine"]) == ["win_rate", "position_bias", "length"]
    [note] = benchmark.notes
    assert GAMED.name in note
    assert benchmark.protocol == f"{AlpacaEval(Files(folder)).protocol}, without length control"
    (tmp_path / GAMED.name).write_text("model,index\nx,0\n")
    with pytest.raises(UserError, match=r"df_gamed\.csv does not have the columns"):
        AlpacaEval(Files(tmp_path))


def test_answers_are_written_as_on_the_leaderboard_and_read_in_any_order(
    folder: Path, benchmark: AlpacaEval, tmp_path: Path
) -> None:
    path = benchmark.write_answers(tmp_path, "mine", ANSWERS)
    assert path == tmp_path / "mine" / "model_outputs.json"
    rows = json.loads(path.read_text())
    assert rows[1] == {**ROWS[1], "output": ANSWERS["1"].turns[0], "generator": "mine"}
    random.Random(0).shuffle(rows)
    lines = tmp_path / "outputs.jsonl"
    lines.write_text("\n".join(json.dumps({**row, "instruction": row["instruction"].strip()}) for row in rows))
    assert benchmark.read_answers(path) == benchmark.read_answers(lines) == ANSWERS
    short = AlpacaEval(Files(folder), limit=5)
    own = short.write_answers(tmp_path, "short", ANSWERS)
    assert len(json.loads(own.read_text())) == 5
    assert short.read_answers(own) == short.read_answers(path) == {str(i): ANSWERS[str(i)] for i in range(5)}
    with pytest.raises(UserError, match="800 of 805 instructions of AlpacaEval have no output"):
        benchmark.read_answers(own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([*ROWS[2:], {"instruction": "Who?", "output": "I"}, ROWS[9]]), "2 of 805 .* 1 of .* and 1 are"),
        (json.dumps([*ROWS, {"instruction": "Who?", "output": "I"}]), "0 of 805 .* 1 of .* and 0 are"),
        (json.dumps([*ROWS, ROWS[9]]), "0 of 805 .* 0 of .* and 1 are"),
        (json.dumps([{**ROWS[0], "output": None}]), "row 1 has no `instruction` and `output`"),
        (json.dumps({"output": "x"}), "not a JSON list of objects"),
        ("[{", "not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(content: str, message: str, benchmark: AlpacaEval, tmp_path: Path) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        benchmark.read_answers(path)
    with pytest.raises(UserError, match="cannot be read"):
        benchmark.read_answers(tmp_path / "none.json")


def test_verdicts_are_written_as_on_the_leaderboard(folder: Path, tmp_path: Path) -> None:
    short = AlpacaEval(Files(folder), limit=2)
    answers = judged(np.array([0.75, np.nan]))
    path = short.write_verdicts(tmp_path, "mine", "judge", short.asks(ANSWERS), answers, {"0/model-first": "m"})
    first, second = json.loads(path.read_text())
    assert path == tmp_path / "mine" / "annotations.json"
    texts = {"baseline-first": None, "model-first": "m"}
    row = annotations(np.full(N, 0.75)).to_dict("records")[0]
    assert first == {**row, "raw_completion": texts}
    assert second["preference"] is None
    assert package("metrics").get_winrate(package("utils").load_or_convert_to_dataframe(path))["win_rate"] == 75


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="`weigted` is no reading; did you mean `weighted`"):
        AlpacaEval(Files(folder), reading="weigted")
    (tmp_path / BASELINE.name).write_text(json.dumps(ROWS[:804]))
    with pytest.raises(UserError, match="has 804 instructions and AlpacaEval has 805"):
        AlpacaEval(Files(tmp_path))
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics.glm_winrate", None)
    with pytest.raises(MissingError, match=r"aligndistil\[eval\]"):
        AlpacaEval(Files(folder))


@pytest.mark.skipif(not (STORE / f"{BASELINE.name}.gz").is_file(), reason=f"{BASELINE.name} is not at {STORE}")
def test_the_real_questions_are_those_that_are_pinned() -> None:
    files = Files(STORE)
    benchmark = AlpacaEval(files)
    assert files.notes == []
    assert [question.id for question in benchmark.questions] == [str(i) for i in range(N)]
    asks = benchmark.asks({question.id: Answer(("x",)) for question in benchmark.questions})
    assert len({ask.key for ask in asks}) == len(asks) == 2 * N
    instructions = {question.turns[0].strip() for question in benchmark.questions}
    assert len(instructions) == N  # so that answers can be matched by them
    for ask in asks:
        assert ask.compared is not None
        [shown] = [turn["content"] for turn in ask.messages if turn["role"] == "user"]
        assert ask.compared.prompt[0]["content"] in shown
        assert shown.index(f'"""{ask.compared.first}"""') < shown.rindex(f'"""{ask.compared.second}"""')
