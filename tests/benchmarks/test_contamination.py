"""Questions in training data: which are found, which data is searched, and what is said of it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.benchmarks.base import Question
from aligndistil.benchmarks.contamination import Contamination, TrainingData, find, note, refusal, training_data
from aligndistil.data import eval_prompts
from aligndistil.recipe import Data, Source, load_recipe
from aligndistil.run_folder import Done, RunFolder, model_card
from support.recipes import merged, off_policy

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
QUESTIONS = [
    Question("long", (LONG,)),
    Question("short", ("Where is the sea?", "Why is that so?")),
    Question("second", ("Something else entirely, please.", f"And {LONG}")),
    Question("tiny", ("Say hello",)),
]


def found_in(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find(TrainingData([(Source(path=str(file)), None)]), QUESTIONS, "alpaca_eval").questions


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (f"Count: {LONG.upper().replace(' ', ', ')}!", ["long", "second"]),
        (" ".join(["zero", *LONG.split()[:13]]), ["long", "second"]),
        (" ".join(["zero", *LONG.split()[:12], "zero"]), []),
        ("where is THE sea", ["short"]),
        ("Tell me: where is the sea?", []),
        ("Why is that so?", []),  # a second turn
        ("Say hello", []),
    ],
)
def test_thirteen_words_in_a_row_or_a_whole_short_first_turn(prompt: str, found: list[str], tmp_path: Path) -> None:
    assert found_in(tmp_path, [{"prompt": "nothing"}, {"prompt": prompt}]) == found


def test_prompts_that_were_held_out_were_not_trained_on(tmp_path: Path) -> None:
    asked = [Question(str(i), (f"What is the number after {i}, please?",)) for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": question.turns[0]}) + "\n" for question in asked))
    section = Data.model_validate({"train": {"path": str(file)}, "eval": {"fraction": 0.3}})
    held = [record.prompt for record in eval_prompts(section)]
    found = find(TrainingData([(section.train[0], section.held_out)]), asked, "pairwise").questions
    assert found == [question.id for question in asked if question.turns[0] not in held]
    assert 0 < len(found) < 60


def test_every_turn_of_the_user_counts_and_no_other(tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]

    assert found_in(tmp_path, [{"messages": turns("hi", "yes?", "Where is the sea?", "There.")}]) == ["short"]
    assert found_in(tmp_path, [{"messages": turns("hi", "Where is the sea?", "so?", LONG)}]) == []
    # HH: both answers follow the same conversation; an unusable row is left out as in training
    opening = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: Where is the sea?\n\nAssistant:"
    whole = {"chosen": f"{opening} a", "rejected": f"{opening} b"}
    hh = [whole, whole, {"chosen": "c", "rejected": "d"}]
    assert found_in(tmp_path, hh) == ["short"]
    pair = {"prompt": "hi", "chosen": LONG, "rejected": "Where is the sea?"}
    assert found_in(tmp_path, [pair]) == []


def test_the_benchmark_itself_holds_all_questions_unread_and_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    gone = Source(path=str(tmp_path / "gone.jsonl"))
    data = TrainingData([(Source(path="tatsu-lab/alpaca_eval"), None), (gone, None)], ["the data of stage x"])
    found = find(data, QUESTIONS, "alpaca_eval")
    assert found.questions == [question.id for question in QUESTIONS]
    assert found.sources == ["tatsu-lab/alpaca_eval, split train"]
    assert found.unknown[0] == "the data of stage x"
    assert "gone.jsonl, split train (" in found.unknown[1]
    assert "there is no such file" in found.unknown[1]
    assert find(TrainingData([(gone, None)]), QUESTIONS, "mt_bench").questions == []


@pytest.mark.parametrize(
    ("count", "total", "refused"), [(8, 805, False), (9, 805, True), (2, 80, False), (3, 80, True), (0, 80, False)]
)
def test_more_than_one_percent_is_refused_and_a_few_by_chance_are_noted(count: int, total: int, refused: bool) -> None:
    found = Contamination([f"q{i}" for i in range(count)], total, ["a.jsonl, split train"], [])
    said = refusal(found, "MT-Bench", "dpo")
    below = note(found, "MT-Bench", "dpo")
    assert (said is not None) == refused
    assert (below is not None) == (count > 0)
    for sentence in filter(None, (said, below)):
        assert f"dpo was trained on {count} of the {total} questions of MT-Bench, q0 for one" in sentence
        assert "a.jsonl, split train" in sentence
        assert ("--allow-contaminated" in sentence) == refused


def test_data_that_could_not_be_searched_stands_under_the_table() -> None:
    found = Contamination([], 80, [], ["the data of stage x (its folder is not there)"])
    assert refusal(found, "MT-Bench", "dpo") is None
    assert "dpo may have met MT-Bench" in str(note(found, "MT-Bench", "dpo"))
    assert "the data of stage x (its folder is not there)." in str(note(found, "MT-Bench", "dpo"))


@pytest.fixture
def run(tmp_path: Path, recipe_file: Callable[..., Path], pairs_file: Callable[..., str]) -> Path:
    """SFT, DPO after it with two sources, and a stage that has nothing to do with them."""
    first, second, third, fourth = (pairs_file(4, seed=i, name=f"{i}.jsonl") for i in range(4))
    content = off_policy("builtin:tiny", first)
    stages = {
        "sft": {"objective": {"name": "sft"}},
        "dpo": {
            "objective": {"name": "dpo"},
            "model": {"path": "stage:sft"},
            "models": {"reference": "stage:sft"},
            "data": {"train": [{"path": second}, {"path": third}]},
        },
        "other": {"objective": {"name": "simpo"}, "data": {"train": {"path": fourth}}},
    }
    shared = {name: section for name, section in content.items() if name not in ("objective", "models")}
    recipe = load_recipe(recipe_file(merged(shared, {"stages": stages})))
    folder = RunFolder(tmp_path / "run")
    for name, stage in recipe.stages.items():
        folder.stage(name).final.mkdir(parents=True)
        about: dict[str, Any] = {"fingerprint": "f", "step": 1, "seconds": 1.0, "metrics": {}}
        inputs = {one: f"weights of {one}" for one in stage.inputs}
        done = Done(weights=f"weights of {name}", inputs=inputs, resolved=stage.resolved(), **about)
        folder.stage(name).write_done(done)
        card: dict[str, Any] = dict.fromkeys(("name", "base_model", "initial", "objective", "paper"), "x")
        card |= {key: {} for key in ("license", "models", "metrics", "headline", "versions")}
        text = model_card(**card, data=[], scalar=False, on_policy=False, recipe=stage.resolved())
        (folder.stage(name).final / "README.md").write_text(text)
    return folder.path


def files(data: TrainingData | None) -> list[str]:
    assert data is not None
    return [Path(source.path).name for source, _ in data.sources]


def test_the_data_of_a_stage_is_also_that_of_the_stages_it_was_trained_with(run: Path, tmp_path: Path) -> None:
    for path in (run / "dpo", run / "dpo" / "final"):
        assert files(training_data(str(path))) == ["1.jsonl", "2.jsonl", "0.jsonl"]
    assert files(training_data(str(run / "other"))) == ["3.jsonl"]
    stage = RunFolder(run).stage("other")  # trained from a model of another run
    done = stage.read_done()
    assert done is not None
    resolved = merged(done.resolved, {"model": {"path": str(run / "sft" / "final")}})
    stage.write_done(done.model_copy(update={"resolved": resolved}))
    assert files(training_data(str(run / "other"))) == ["3.jsonl", "0.jsonl"]


def test_a_stage_that_is_gone_or_another_by_now_is_unknown(run: Path) -> None:
    stage = RunFolder(run).stage("sft")
    done = stage.read_done()
    assert done is not None
    stage.write_done(done.model_copy(update={"weights": "others"}))
    for _ in range(2):
        data = training_data(str(run / "dpo"))
        assert files(data) == ["1.jsonl", "2.jsonl"]
        assert data is not None
        assert data.unknown == ["the data of stage sft (its folder is not there, or it was trained again)"]
        shutil.rmtree(stage.path, ignore_errors=True)


def test_a_copied_model_has_its_card_and_others_are_not_known(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run / "dpo" / "final", copied)
    data = training_data(str(copied))
    assert files(data) == ["1.jsonl", "2.jsonl"]
    assert data is not None
    assert "the data of stage sft" in data.unknown[0]
    (copied / "README.md").write_text("# A model\n\n## Recipe\n\n```yaml\nflour: 200 g\n```\n")
    assert training_data(str(copied)) is None
    assert training_data("OWNER/NAME") is None
    assert training_data("builtin:tiny") is None


def test_preferences_on_alpaca_eval_s_own_instructions_are_found() -> None:
    instructions, pairs = SHARED / "alpaca_eval_instructions.json.gz", SHARED / "alpaca_prefs.train.jsonl.gz"
    if not instructions.is_file() or not pairs.is_file():
        pytest.skip(f"needs {instructions} and {pairs}")
    texts = [row["instruction"] for row in json.loads(gzip.decompress(instructions.read_bytes()))]
    questions = [Question(str(i), (text,)) for i, text in enumerate(texts)]
    lines = gzip.decompress(pairs.read_bytes()).decode().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    found = find(TrainingData([(Source(path=str(pairs)), None)]), questions, "alpaca_eval")
    equal = {str(i) for i, text in enumerate(texts) if text in prompts and len(text.split()) >= 3}
    assert len(equal) > 500
    assert equal <= {*found.questions}
    assert len(found.questions) < 1.05 * len(equal)
    assert refusal(found, "AlpacaEval 2", "dpo") is not None
    apart = find(TrainingData([(Source(path=str(SHARED / "hh_harmless.jsonl.gz")), None)]), questions, "alpaca_eval")
    assert len(apart.questions) < 3
