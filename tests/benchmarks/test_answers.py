"""Answers come from the one place that samples, are kept as they come, and are sampled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligndistil.benchmarks.answers import Answerer, AnswerStore, Decoding
from aligndistil.benchmarks.base import Answer, Question
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.errors import UserError
from aligndistil.recipe import Model
from aligndistil.rollout import LoadedModel

ALONE = Processes(0, 1, torch.device("cpu"))
QUESTIONS = [
    Question("a", ("w01 w02",), temperature=1.0),
    Question("b", ("w03",)),
    Question("c", ("w04 w05 w06", "w07"), temperature=0.5),
    Question("d", ("w08",), opening=({"role": "user", "content": "w09"}, {"role": "assistant", "content": "w10"})),
    Question("e", ("w11 w12 w13 w14",), temperature=1.0),
]
SHORT = Decoding(6, batch_size=2)


def ask(
    model: str, store: AnswerStore, decoding: Decoding = SHORT, questions: list[Question] = QUESTIONS
) -> dict[str, Answer]:
    return Answerer(model, Model(path=model), decoding, ALONE).answer(questions, store, "test", lambda count: None)


def store_at(tmp_path: Path, decoding: Decoding = SHORT, model: str = "weights") -> AnswerStore:
    return AnswerStore(tmp_path / "answers.jsonl", model, decoding)


def test_no_answer_depends_on_the_questions_it_is_decoded_with(
    model_folder: Callable[..., str], tmp_path: Path
) -> None:
    path = model_folder(seed=1)
    together = ask(path, store_at(tmp_path / "1", Decoding(6, batch_size=8)), Decoding(6, batch_size=8))
    alone = {
        question.id: ask(path, store_at(tmp_path / question.id), questions=[question])[question.id]
        for question in QUESTIONS
    }
    assert together == alone
    assert list(together) == ["a", "b", "c", "d", "e"]
    assert [len(answer.turns) for answer in together.values()] == [1, 1, 2, 1, 1]


def test_temperature_zero_is_the_likeliest_token_each_time(model_folder: Callable[..., str], tmp_path: Path) -> None:
    path = model_folder(seed=1)
    answer = ask(path, store_at(tmp_path))["d"]
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    answerer = Answerer(path, Model(path=path), SHORT, ALONE)
    ids = answerer.tokenizer("<user> w09 <bot> w10 <eos> <user> w08 <bot>", add_special_tokens=False)["input_ids"]
    prompt = len(ids)
    while len(ids) - prompt < 6 and ids[-1] != answerer.tokenizer.eos_token_id:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.turns == (answerer.tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip(),)
    assert answer.token_counts == (len(ids) - prompt,)
    assert answer.finished == (ids[-1] == answerer.tokenizer.eos_token_id)


def test_the_second_turn_is_asked_after_the_first_answer(
    model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    sample = LoadedModel.sample

    def watched(self: LoadedModel, prompts: Any, params: Any, seeds: Any) -> Any:
        shown.extend(self.tokenizer.batch_decode(prompts))
        return sample(self, prompts, params, seeds)

    monkeypatch.setattr(LoadedModel, "sample", watched)
    answer = ask(model_folder(seed=1), store_at(tmp_path), questions=[QUESTIONS[2]])["c"]
    first, second = shown
    assert first == "<user> w04 w05 w06 <bot>"
    assert second.split() == f"<user> w04 w05 w06 <bot> {answer.turns[0]} <eos> <user> w07 <bot>".split()


def test_an_interrupted_run_asks_only_for_what_is_missing(
    model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = model_folder(seed=1), store_at(tmp_path)
    quiet = ask(path, store_at(tmp_path / "quiet"))
    asked: list[int] = []
    sample = LoadedModel.sample

    def dying(self: LoadedModel, prompts: Any, params: Any, seeds: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, params, seeds)

    monkeypatch.setattr(LoadedModel, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(path, store)
    there = len(store.read(QUESTIONS))
    assert 0 < there < len(QUESTIONS)
    with store.path.open("ab") as file:  # as a kill leaves it
        file.write(b'{"question": "e", "key": "12')
    before = sum(asked)
    assert ask(path, store) == quiet
    turns = sum(len(question.turns) for question in QUESTIONS if question.id not in {*store.read(QUESTIONS)})
    assert turns == 0
    assert sum(asked) - before == sum(len(q.turns) for q in QUESTIONS) - (before - asked[2])
    monkeypatch.setattr(LoadedModel, "sample", None)
    assert ask(path, store) == quiet  # nothing is sampled any more


def test_answers_of_another_model_decoding_or_question_are_none(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.add([(QUESTIONS[0], Answer(("w01",), (1,)))])
    assert store.read(QUESTIONS) == {"a": Answer(("w01",), (1,))}
    assert store_at(tmp_path, model="others").read(QUESTIONS) == {}
    assert store_at(tmp_path, Decoding(7, batch_size=2)).read(QUESTIONS) == {}
    assert store_at(tmp_path, Decoding(6, seed=1)).read(QUESTIONS) == {}
    assert store_at(tmp_path, Decoding(6, batch_size=9)).read(QUESTIONS) != {}
    assert store.read([Question("a", ("w01 w03",), temperature=1.0)]) == {}
    assert store.read([Question("a", ("w01 w02",), temperature=0.9)]) == {}


def test_what_was_cut_is_known(model_folder: Callable[..., str], tmp_path: Path) -> None:
    path = model_folder(seed=1, max_position_embeddings=16)
    long = Question("long", (" ".join(["w01"] * 40),))
    answer = ask(path, store_at(tmp_path, Decoding(100)), Decoding(100), [long, QUESTIONS[1]])
    assert answer["long"].prompt_cut
    assert not answer["b"].prompt_cut
    assert max(answer["long"].token_counts) <= 8  # half of what the model reads
    assert answer["long"].finished == (answer["long"].token_counts[0] < 8)


def test_two_turns_need_a_chat_template(model_folder: Callable[..., str], tmp_path: Path) -> None:
    path = model_folder(seed=1)
    answerer = Answerer(path, Model(path=path), SHORT, ALONE)
    answerer.tokenizer.chat_template = None
    assert answerer.answer(QUESTIONS[:2], store_at(tmp_path), "test", lambda count: None)
    with pytest.raises(UserError, match="no chat template"):
        answerer.answer(QUESTIONS[2:3], store_at(tmp_path), "test", lambda count: None)


def shared(path: str, folder: str) -> dict[str, list[str]]:
    processes = start_processes()
    answerer = Answerer(path, Model(path=path), SHORT, processes)
    new: list[int] = []
    found = answerer.answer(QUESTIONS, store_at(Path(folder)), "test", new.append)
    assert sum(new) == len(QUESTIONS)
    return {key: list(answer.turns) for key, answer in found.items()}


def test_two_processes_share_the_questions(
    model_folder: Callable[..., str], tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    path = model_folder(seed=1)
    alone = {key: list(answer.turns) for key, answer in ask(path, store_at(tmp_path / "alone")).items()}
    assert on_processes(shared, path, str(tmp_path)) == [alone, alone]
    assert len(store_at(tmp_path).read(QUESTIONS)) == len(QUESTIONS)
