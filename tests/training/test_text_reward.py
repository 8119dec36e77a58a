"""A reward model of another tokenizer than the policy's is told the conversation, in its own words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from aligndistil.batch import DataKind, Row, collate
from aligndistil.data import PromptReader
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.models import load_scalar_model
from aligndistil.recipe import Model, load_recipe
from aligndistil.run_folder import StageFolder
from aligndistil.stop import StopSignal
from aligndistil.training import StageTraining, TextReader, TextReward
from support.models import EOS, WORDS, build_model, build_tokenizer
from support.recipes import actor_critic

ModelFolder = Callable[..., str]
USER, BOT = 3, 4
THEIRS = "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
"""Another chat template, with words of its own."""


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """A GPT-2 that scores, with the words in another order, two more of its own, and another template."""
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=105, num_labels=1, pad_token_id=0, eos_token_id=EOS, **sizes)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer = build_tokenizer([*WORDS[::-1], "user", "assistant", ":"])
    tokenizer.chat_template = THEIRS
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def by_transformers(path: str, said: list[tuple[str, str]]) -> list[float]:
    """What transformers makes of each question and answer, one at a time."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    scores = []
    for question, answer in said:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns if answer else turns[:1], tokenize=False).rstrip()
        text += "" if answer else " <eos>"  # a response of nothing is its end alone
        with torch.no_grad():
            scores.append(float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits))
    return scores


def text_reward(path: str) -> TextReward:
    tokenizer = build_tokenizer()
    reader = TextReader("the reward", path, Model(path=path), PromptReader(tokenizer, frozenset({EOS}), {}))
    model = ScalarModel(load_scalar_model(path, Model(path=path), trained=False))
    return TextReward(model, reader, tokenizer)


def test_a_text_that_is_longer_than_its_table_of_positions_is_refused(reward: str) -> None:
    rows = [Row([USER, *[5] * 40, BOT], [*[6] * 40, EOS])]
    with pytest.raises(UserError, match=r"the reward has 64 positions, and the longest text needs \d+ of its tokens"):
        text_reward(reward).scores(collate(rows, DataKind.RESPONSES, 0))


def test_the_score_of_a_response_is_that_of_its_text(reward: str) -> None:
    rows = [
        Row([USER, 5, BOT], [7, 8, EOS]),
        Row([USER, 6, 6, BOT], [9, 10, 11, 12]),  # cut
        Row([USER, 5, 6, 7, 8, 9, BOT], [5, EOS]),
    ]
    batch = collate(rows, DataKind.RESPONSES, 0)
    scores = text_reward(reward).scores(batch)
    theirs = by_transformers(
        reward, [("w00", "w02 w03"), ("w01 w01", "w04 w05 w06 w07"), ("w00 w01 w02 w03 w04", "w00")]
    )
    assert scores.dtype == torch.float32
    assert len(set(theirs)) == 3
    for row, found, expected in zip(rows, scores, theirs, strict=True):
        last = len(row.prompt_ids) + len(row.response_ids) - 1
        assert float(found[last]) == pytest.approx(expected, abs=1e-5)
        assert int((found != 0).sum()) == 1


def test_a_response_of_nothing_is_scored_at_its_end(reward: str) -> None:
    scores = text_reward(reward).scores(collate([Row([USER, 5, BOT], [EOS])], DataKind.RESPONSES, 0))
    assert [float(scores[0, 3])] == pytest.approx(by_transformers(reward, [("w00", "")]), abs=1e-5)


def test_the_words_of_the_recipe_are_not_those_of_the_reward(reward: str) -> None:
    """`model.chat_template` and its arguments are the policy's."""
    policy = PromptReader(build_tokenizer(), frozenset({EOS}), {})
    section = Model(path="policy", chat_template="{{ messages[0].content }}", chat_template_kwargs={"mine": True})
    [row] = TextReader("the reward", reward, section, policy).rows([[USER, 5, BOT]], ["w02"])
    text = AutoTokenizer.from_pretrained(reward).decode([*row.prompt_ids, *row.response_ids])
    assert text == "user : w00 <eos> assistant : w02 <eos>"


@pytest.mark.parametrize(
    ("template", "prompts", "sentence"),
    [
        (THEIRS, [[USER, 5, BOT], [5, 6, 7]], r"1 of 2 prompts cannot be turned back into one \(cut by"),
        ("{{ raise_exception('no users') }}", [[USER, 5, BOT]], r"cannot read .*no users"),
        (None, [[USER, 5, BOT, 6, EOS, USER, 7, BOT]], r"has no chat template, and the prompts are conversations"),
    ],
)
def test_prompts_that_cannot_be_told_are_refused(
    template: str | None, prompts: list[list[int]], sentence: str, reward: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.chat_template = template
    (Path(reward) / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(reward)
    policy = PromptReader(build_tokenizer(), frozenset({EOS}), {})
    reader = TextReader("the reward", reward, Model(path=reward), policy)
    with pytest.raises(UserError, match=sentence) as caught:
        reader.check(prompts)
    assert "\n" not in str(caught.value)
    assert "python:MODULE:FUNCTION" in str(caught.value)


def launch(
    content: dict[str, Any], recipe_file: Callable[..., Path], processes: Processes, folder: Path
) -> StageTraining:
    (stage,) = load_recipe(recipe_file(content)).stages.values()
    return StageTraining(stage, StageFolder(folder), lambda path: path, processes)


@pytest.mark.parametrize("zero", [0, 3])
def test_ppo_is_trained_with_it(
    zero: int,
    reward: str,
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    recipe_file: Callable[..., Path],
    processes: Processes,
    tmp_path: Path,
) -> None:
    settings = {"train": {"max_steps": 1}, "logging": {"every": 1}, "engine": {"zero_stage": zero}}
    start = model_folder(seed=0)
    content = actor_critic(start, reward, model_folder(seed=4), pairs_file(10), **settings)
    launched = launch(content, recipe_file, processes, tmp_path / "run")
    launched.run(StopSignal())
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    line = next(line for line in lines if line["split"] == "train")
    samples = [json.loads(row) for row in (tmp_path / "run" / "samples" / "step-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    said = [(row["prompt"].removeprefix("<user> ").removesuffix(" <bot>"), row["response"]) for row in samples]
    assert line["objective/scores"] == pytest.approx(sum(by_transformers(reward, said)) / 8, abs=1e-4)


@pytest.mark.parametrize("role", ["critic", "reference", "rto"])
def test_models_that_are_read_token_by_token_need_the_tokens_of_the_policy(
    role: str,
    reward: str,
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    recipe_file: Callable[..., Path],
    processes: Processes,
    tmp_path: Path,
) -> None:
    start = model_folder(seed=0)
    content = actor_critic(start, model_folder(seed=3, scalar=True), start, pairs_file(10))
    if role == "rto":
        content["objective"] = {"name": "rto", "version": "v3"}
        content["models"] |= {"teacher": start, "reward": reward}
    elif role == "critic":
        content["models"]["critic"] = reward
    else:
        build_model(seed=1).save_pretrained(tmp_path / "other")
        build_tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "other")
        content["models"]["reference"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"has another tokenizer than the policy: \d+ tokens differ, 'w\d+' for one"):
        launch(content, recipe_file, processes, tmp_path / "run").run(StopSignal())
