"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns, each answer rated from 1 to 10 by a judge.

The protocol is that of FastChat's `llm_judge`, grading one answer at a time, with two exceptions: a reply without a
rating is asked again, and one outside 1 to 10 is no rating (there it counts as it stands).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from aligndistil.benchmarks.base import Answer, Answers, Benchmark, JudgedAnswers, Question, Values, ratio_values
from aligndistil.benchmarks.files import BenchmarkFile, Files
from aligndistil.benchmarks.formats import (
    answer_id,
    complete,
    filled,
    json_lines,
    read_json_lines,
    write_json_lines,
)
from aligndistil.errors import UserError
from aligndistil.judge import Ask, Message, Reply, Unreadable
from aligndistil.objectives.base import MetricInfo

_REPOSITORY = "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
_DATA = f"{_REPOSITORY}/fastchat/llm_judge/data"
QUESTIONS = BenchmarkFile(
    "mt_bench_questions.jsonl",
    f"{_DATA}/mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
)
REFERENCES = BenchmarkFile(
    "mt_bench_reference_gpt4.jsonl",
    f"{_DATA}/mt_bench/reference_answer/gpt-4.jsonl",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
)
PROMPTS = BenchmarkFile(
    "mt_bench_judge_prompts.jsonl",
    f"{_DATA}/judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
)
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories in which the judge is shown the answers of gpt-4, whichever model judges."""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers, by category; the others are greedy."""
REMINDER = (
    "I found no rating from 1 to 10 in that. Finish your judgment with the rating, as a number alone in double square "
    "brackets: [[rating]]."
)
NOT_RATED = -1
"""How FastChat writes that there is no rating."""


class MTBench(Benchmark):
    """Questions of eight categories; the judge rates the first answer, and the second with the conversation before it.

    A `limit` takes the questions evenly over the categories, which stand one after the other in the file: the first of
    each category, then the second of each.
    """

    name = "mt_bench"
    title = "MT-Bench"
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "average": MetricInfo("", "mean over the ratings of both turns, 1 to 10", better="more"),
        "turn_1": MetricInfo("", "mean rating of the first answers, 1 to 10", better="more"),
        "turn_2": MetricInfo("", "mean rating of the second answers, 1 to 10", better="more"),
    }
    max_new_tokens = 1024
    protocol = "single-answer grading with the prompts of FastChat 0e6d3e4"

    def __init__(self, files: Files, limit: int | None = None) -> None:
        super().__init__(files, limit)
        questions, prompts, references = (
            json_lines(files.get(file), file.name) for file in (QUESTIONS, PROMPTS, REFERENCES)
        )
        try:
            every = [_question(line) for line in questions]
            self._prompts = {line["name"]: (line["system_prompt"], line["prompt_template"]) for line in prompts}
            self._references = {str(line["question_id"]): line["choices"][0]["turns"] for line in references}
            for question in every:
                for turn in (1, 2):
                    self._messages(question, ("", ""), turn)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{QUESTIONS.name}, {PROMPTS.name} and {REFERENCES.name} are not those of MT-Bench ({error}); they are "
                f"to be had below {_DATA}"
            ) from None
        self._ids = {question.id for question in every}
        place = [sum(other.category == one.category for other in every[:i]) for i, one in enumerate(every)]
        self.limit = None if limit is None or limit >= len(every) else limit
        self._questions = [every[i] for i in sorted(sorted(range(len(every)), key=place.__getitem__)[:limit])]
        if len(self._questions) < len(every):
            self.notes.append(f"MT-Bench: its {len(self._questions)} questions are taken evenly over the categories.")

    @property
    def questions(self) -> Sequence[Question]:
        return self._questions

    def asks(self, answers: Answers) -> list[Ask]:
        """Keys are `81/turn-1` and `81/turn-2`; verdicts are ratings."""
        return [
            Ask(
                f"{question.id}/turn-{turn}",
                self._messages(question, answers[question.id].turns, turn),
                _rating,
                max_tokens=2048,
                reminder=REMINDER,
            )
            for question in self._questions
            for turn in (1, 2)
        ]

    def _messages(self, question: Question, answers: Sequence[str], turn: int) -> list[Message]:
        """What the judge reads. Raises KeyError or IndexError where the files lack a part of it."""
        values = {"question": question.turns[0], "answer": answers[0]}
        for i in (0, 1):
            values |= {f"question_{i + 1}": question.turns[i], f"answer_{i + 1}": answers[i]}
            if question.category in WITH_REFERENCE:
                values[f"ref_answer_{i + 1}"] = self._references[question.id][i]
        system, template = self._prompts[_prompt_name(question, turn)]
        return [{"role": "system", "content": system}, {"role": "user", "content": filled(template, values)}]

    def scores(self, models: Mapping[str, JudgedAnswers]) -> dict[str, dict[str, Values]]:
        """As in FastChat, `average` is the mean over all ratings that there are, of whichever turn."""
        found = {}
        for model, judged in models.items():
            keys = [[f"{question.id}/turn-{turn}" for turn in (1, 2)] for question in self._questions]
            ratings = np.array([[float(judged.verdicts.get(key, np.nan)) for key in of_one] for of_one in keys])
            average = ratio_values(np.nansum(ratings, axis=1), np.isfinite(ratings).sum(axis=1))
            found[model] = {"average": average, "turn_1": ratings[:, 0], "turn_2": ratings[:, 1]}
        return found

    def write_answers(self, folder: Path, model: str, answers: Answers) -> Path:
        """FastChat's `model_answer/MODEL.jsonl`."""
        path = folder / "model_answer" / f"{model}.jsonl"
        lines = []
        for question in self._questions:
            turns = answers[question.id].turns
            line = {"question_id": int(question.id), "model_id": model}
            choices = [{"index": 0, "turns": list(turns)}]
            lines.append({**line, "answer_id": answer_id(model, turns), "choices": choices, "tstamp": time.time()})
        write_json_lines(path, lines)
        return path

    def read_answers(self, path: Path) -> dict[str, Answer]:
        """FastChat's `model_answer/MODEL.jsonl`, of which the first choice counts."""
        answers = {}
        for line in read_json_lines(path):
            try:
                id, turns = str(line["question_id"]), line["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError):
                raise UserError(
                    f"{path}: a line has no `question_id` or no `choices` with `turns`; answers to MT-Bench have the "
                    "format of FastChat's gen_model_answer.py"
                ) from None
            if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
                raise UserError(
                    f"{path}: the answer to question {id} is not two turns of text; answer both turns of it"
                )
            answers[id] = Answer(tuple(turns))
        return complete(answers, self._ids, self, path)

    def write_verdicts(
        self, folder: Path, model: str, judge: str, asks: Sequence[Ask], judged: JudgedAnswers, texts: Mapping[str, str]
    ) -> Path:
        """FastChat's `model_judgment/JUDGE_single.jsonl`, which holds all models: those of others stay in it."""
        path = folder / "model_judgment" / f"{judge}_single.jsonl"
        known = read_json_lines(path) if path.exists() else []
        lines = [line for line in known if line.get("model") != model]
        by_id = {question.id: question for question in self._questions}
        for ask in asks:
            id, turn = ask.key.split("/turn-")
            lines.append(
                {
                    "question_id": int(id),
                    "model": model,
                    "judge": [judge, _prompt_name(by_id[id], int(turn))],
                    "user_prompt": ask.messages[-1]["content"],
                    "judgment": texts.get(ask.key, ""),
                    "score": judged.verdicts.get(ask.key, NOT_RATED),
                    "turn": int(turn),
                    "tstamp": time.time(),
                }
            )
        write_json_lines(path, lines)
        return path


def _question(line: Mapping[str, Any]) -> Question:
    temperature = TEMPERATURES.get(line["category"], 0.0)
    return Question(str(int(line["question_id"])), tuple(line["turns"]), (), temperature, line["category"])


def _prompt_name(question: Question, turn: int) -> str:
    """What FastChat calls the prompt with which a turn is judged."""
    kind = "single-math-v1" if question.category in WITH_REFERENCE else "single-v1"
    return kind if turn == 1 else f"{kind}-multi-turn"


def _rating(reply: Reply) -> float:
    """The first number in double square brackets; where there is none, the first in single ones."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply.text) or re.search(r"\[(\d+\.?\d*)\]", reply.text)
    if found is None:
        raise Unreadable("it has no rating in double square brackets")
    if not 1 <= float(found[1]) <= 10:
        raise Unreadable(f"its rating, {found[1]}, is not between 1 and 10")
    return float(found[1])
