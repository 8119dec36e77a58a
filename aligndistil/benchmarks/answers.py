"""A model's answers to a benchmark, kept as they come, so that an interrupted run asks only for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from aligndistil.benchmarks.base import Answer, Question
from aligndistil.data import Encoder, Record
from aligndistil.data.records import Unusable
from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.evaluation.measurements import sha256
from aligndistil.models import load_model, load_tokenizer, shared_vocab, stop_ids
from aligndistil.recipe import Model
from aligndistil.rollout import LoadedModel, SamplingParams, sample_seed


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are sampled, beside the temperature that a question has."""

    max_new_tokens: int
    seed: int = 0
    batch_size: int = 16
    """Prompts that a process answers together; no answer depends on it, but for rounding."""


class AnswerStore:
    """answers.jsonl: one line an answer, each with a hash of all that it depends on. Lines of another hash are ignored.

    A line is added as soon as it is there; one that a kill cut short is none.
    """

    def __init__(self, path: Path, model: str, decoding: Decoding) -> None:
        """`model` says which weights answer, and with which chat template."""
        self.path = path
        self._depends_on = model, decoding.max_new_tokens, decoding.seed

    def read(self, questions: Sequence[Question]) -> dict[str, Answer]:
        """The answers that are there."""
        keys = {self._key(question): question.id for question in questions}
        found: dict[str, Answer] = {}
        for line in self._lines():
            if (question := keys.get(line.pop("key"))) is not None:
                turns, counts = tuple(line["turns"]), tuple(line["token_counts"])
                found[question] = Answer(turns, counts, line["finished"], line["prompt_cut"])
        return found

    def add(self, answers: Sequence[tuple[Question, Answer]]) -> None:
        """Write more of them down."""
        lines = [
            json.dumps({"question": question.id, "key": self._key(question), **asdict(answer)}, ensure_ascii=False)
            for question, answer in answers
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():  # what a kill left of a line is ended, so that it spoils no other
                file.seek(-1, 2)
                lines = lines if file.read(1) == b"\n" else ["", *lines]
            file.write(("\n".join(lines) + "\n").encode())

    def _key(self, question: Question) -> str:
        return sha256(*self._depends_on, question.temperature, question.id, question.key())

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else []:
            try:
                read = json.loads(line)
            except ValueError:
                continue
            if isinstance(read, dict) and {"key", *Answer.__slots__} <= read.keys():
                yield read


class Answerer:
    """A model that answers questions. Making one loads its tokenizer alone; its weights, when there is something to do.

    Raises UserError where a model or its tokenizer cannot be loaded, and as `load_model` does.
    """

    def __init__(self, path: str, section: Model, decoding: Decoding, processes: Processes) -> None:
        self._path, self._section, self._decoding, self._processes = path, section, decoding, processes
        self.tokenizer = load_tokenizer(path, section)
        self._stops = stop_ids(path, section, self.tokenizer)
        self._model: LoadedModel | None = None

    def answer(
        self, questions: Sequence[Question], store: AnswerStore, what: str, on_progress: Callable[[int], None]
    ) -> dict[str, Answer]:
        """The answers to all questions: those of the store, and new ones, which it keeps. Collective.

        `what` names the questions in what their samples are seeded by; `on_progress` is told how many are new.
        """
        processes = self._processes
        found: dict[str, Answer] = processes.gather(store.read(questions))[0]  # others may see the disk later
        waiting = [question for question in questions if question.id not in found]
        # Those of about the same length, decoded alike, are answered together.
        waiting.sort(key=lambda question: (len(question.turns), question.temperature, sum(map(len, question.turns))))
        size = self._decoding.batch_size * processes.world
        for _, kind in groupby(waiting, lambda question: (len(question.turns), question.temperature)):
            alike = list(kind)
            for start in range(0, len(alike), size):
                together = alike[start : start + size]
                own = together[processes.rank :: processes.world]
                parts = processes.gather(self._together(own, what))
                answers = [parts[i % processes.world][i // processes.world] for i in range(len(together))]
                new = list(zip(together, answers, strict=True))
                if processes.is_main:
                    store.add(new)
                found |= {question.id: answer for question, answer in new}
                on_progress(len(new))
        return {question.id: found[question.id] for question in questions}

    def _together(self, questions: Sequence[Question], what: str) -> list[Answer]:
        """Answers to questions of as many turns and the same temperature."""
        if not questions:
            return []
        model = self._loaded()
        context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        longest = min(self._decoding.max_new_tokens, context // 2)
        params = SamplingParams(longest, questions[0].temperature)
        encoder = Encoder(
            self.tokenizer,
            stop_ids=self._stops,
            max_prompt_length=context - longest,
            template_kwargs=self._section.chat_template_kwargs,
            checked=False,
        )
        turns: list[list[str]] = [[] for _ in questions]
        counts: list[list[int]] = [[] for _ in questions]
        finished, cut = [True] * len(questions), [False] * len(questions)
        for k in range(len(questions[0].turns)):
            records = [Record(_prompt(question, said), ()) for question, said in zip(questions, turns, strict=True)]
            encoded = encoder.encode(records)
            ids = []
            for i, one in enumerate(encoded):
                if isinstance(one, Unusable):
                    raise UserError(f"{what}: question {questions[i].id} cannot be asked of {self._path}: {one}")
                ids.append(one.rows[0].prompt_ids)
                cut[i] |= one.prompt_truncated
            seeds = [sample_seed(self._decoding.seed, what, question.id, k) for question in questions]
            samples = model.sample(ids, params, seeds)
            for i, (sample, text) in enumerate(zip(samples, model.texts(samples), strict=True)):
                turns[i].append(text.strip())
                counts[i].append(len(sample.token_ids))
                finished[i] &= sample.finished
        return [
            Answer(tuple(said), tuple(lengths), ended, shortened)
            for said, lengths, ended, shortened in zip(turns, counts, finished, cut, strict=True)
        ]

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            model = on_device(load_model(self._path, self._section, trained=False), self._processes.device).eval()
            vocab = shared_vocab([model], self.tokenizer)
            self._model = LoadedModel(model, self.tokenizer, self._stops, vocab, self._decoding.batch_size)
        return self._model


def _prompt(question: Question, answers: Sequence[str]) -> str | list[dict[str, str]]:
    """The conversation before the next answer; a single question stays a string, which needs no chat template."""
    if not question.opening and not answers:
        return question.turns[0]
    messages = [dict(message) for message in question.opening]
    for said, answer in zip(question.turns, [*answers, None], strict=False):
        messages.append({"role": "user", "content": said})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages
