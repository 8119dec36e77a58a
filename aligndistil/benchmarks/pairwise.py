"""Own evaluations: a model's answers to any prompts, laid beside those of another model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from aligndistil.benchmarks.base import Answer, Answers, Benchmark, JudgedAnswers, Question, Values
from aligndistil.benchmarks.formats import read_json_lines, write_json_lines
from aligndistil.data import Record
from aligndistil.errors import UserError
from aligndistil.judge import Ask, Compared, Reply, Unreadable, Verdict
from aligndistil.objectives.base import MetricInfo

FIRST, TIE, SECOND = "[[A]]", "[[tie]]", "[[B]]"
PREFERENCE = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}
SYSTEM = f"""\
You compare two answers to the same message of a user. Say which of them serves the user better: judge whether it is \
correct, whether it does what was asked, and whether it is clear. A longer answer is not better for its length, and \
the order in which the answers are shown means nothing.

Give your reasons in a few sentences. Then end with your verdict on a line of its own: {FIRST} if answer A is better, \
{SECOND} if answer B is better, {TIE} if neither is."""
REMINDER = f"Your verdict is missing. Write it now, and nothing else: {FIRST}, {SECOND} or {TIE}."
ORDERS = ("baseline-first", "model-first")


class Pairwise(Benchmark):
    """The win rate against another model's answers; a tie is half a win."""

    name = "pairwise"
    title = "Pairwise"
    pairwise = True
    max_new_tokens = 1024
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "win_rate": MetricInfo(
            "%",
            "answers that the judge prefers to those of the model that `report.against` (`--against`) names, in both "
            "orders; a tie is half",
        ),
        "tie_rate": MetricInfo("%", "verdicts that neither answer is better"),
        "position_bias": MetricInfo(
            "points", "how far the judge prefers the answer that it is shown first; 0 is not at all"
        ),
    }

    def __init__(self, questions: Sequence[Question], against: Answers, baseline: str) -> None:
        """`against` are the answers of the model called `baseline`, to all of the questions."""
        self.limit = None
        self.notes = []
        self.baseline = baseline
        self._questions, self._against = list(questions), against

    @property
    def questions(self) -> Sequence[Question]:
        return self._questions

    def asks(self, answers: Answers) -> list[Ask]:
        found = []
        for question in self._questions:
            model, other = answers[question.id].turns[-1], self._against[question.id].turns[-1]
            conversation = [*question.opening, {"role": "user", "content": question.turns[-1]}]
            for order, (first, second) in zip(ORDERS, ((other, model), (model, other)), strict=True):
                shown = (
                    f"{_shown(conversation)}\n\n<answer A>\n{first}\n</answer A>\n\n<answer B>\n{second}\n</answer B>"
                )
                found.append(
                    Ask(
                        f"{question.id}/{order}",
                        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": shown}],
                        _read,
                        max_tokens=1024,
                        reminder=REMINDER,
                        compared=Compared(conversation, first, second),
                    )
                )
        return found

    def scores(self, models: Mapping[str, JudgedAnswers]) -> dict[str, dict[str, Values]]:
        return {name: self._scores(judged.verdicts) for name, judged in models.items()}

    def _scores(self, verdicts: Mapping[str, Verdict]) -> dict[str, Values]:
        keys = [[f"{question.id}/{order}" for order in ORDERS] for question in self._questions]
        # (Q, 2) how far the answer that is shown first is preferred; NaN without a verdict.
        first = np.array([[float(verdicts.get(key, np.nan)) for key in of_question] for of_question in keys])
        return {
            "win_rate": 50 * (1 - first[:, 0] + first[:, 1]),
            "tie_rate": np.where(np.isnan(first).any(axis=1), np.nan, 100 * (first == 0.5).mean(axis=1)),
            "position_bias": 100 * (first.mean(axis=1) - 0.5),
        }

    def write_answers(self, folder: Path, model: str, answers: Answers) -> Path:
        """One line a question: `question_id`, `prompt` (messages), `response`."""
        lines = [
            {
                "question_id": question.id,
                "prompt": [*question.opening, {"role": "user", "content": question.turns[-1]}],
                "response": answers[question.id].turns[-1],
            }
            for question in self._questions
        ]
        path = folder / "answers" / f"{model}.jsonl"
        write_json_lines(path, lines)
        return path

    def read_answers(self, path: Path) -> dict[str, Answer]:
        return read_answers(path, self._questions)

    def write_verdicts(
        self, folder: Path, model: str, judge: str, asks: Sequence[Ask], judged: JudgedAnswers, texts: Mapping[str, str]
    ) -> Path:
        """One line a question and order, with the `preference` for the answer shown first, and the `judgment`."""
        lines: list[dict[str, object]] = []
        for ask in asks:
            question, _, order = ask.key.rpartition("/")
            lines.append({"question_id": question, "model": model, "baseline": self.baseline, "judge": judge})
            lines[-1] |= {"order": order, "preference": judged.verdicts.get(ask.key), "judgment": texts.get(ask.key)}
        path = folder / "judgments" / judge / f"{model}.jsonl"
        write_json_lines(path, lines)
        return path


def questions_of(prompts: Iterable[Record], limit: int | None, temperature: float) -> list[Question]:
    """Prompts of data, each once, the first `limit` of them.

    Raises UserError when there is none.
    """
    found: dict[str, Question] = {}
    for record in prompts:
        *opening, last = (
            [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
        )
        question = Question("", (last["content"],), tuple(opening), temperature)
        found.setdefault(question.key(), replace(question, id=str(len(found))))
        if len(found) == limit:
            break
    if not found:
        raise UserError("there is no prompt in the data that the models are to be asked; give other data")
    return list(found.values())


def read_answers(path: Path, questions: Sequence[Question]) -> dict[str, Answer]:
    """Answers as `Pairwise.write_answers` writes them, matched by `question_id`, or else by the text of the prompt.

    Raises UserError when the file cannot be read, or lacks the answer to a question.
    """
    asked = {question.id: question.turns[-1] for question in questions}
    by_text = {text: id for id, text in asked.items()}
    found: dict[str, Answer] = {}
    for number, row in enumerate(read_json_lines(path), 1):
        try:
            prompt = row.get("prompt")
            text = prompt[-1]["content"] if isinstance(prompt, list) else prompt
            question = str(row["question_id"]) if "question_id" in row else by_text.get(str(text), "")
            found[question] = Answer((str(row["response"]),))
        except (LookupError, TypeError):
            raise UserError(
                f"{path}: answer {number} has no `response`, or neither `question_id` nor `prompt`; give it both"
            ) from None
        if text is not None and text != asked.get(question, text):
            raise UserError(
                f"{path}: answer {number} is to another prompt than question {question}; give its own answers"
            )
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer in it, {missing[0]} for one"
        )
    return {question.id: found[question.id] for question in questions}


def _shown(conversation: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(f"<{turn['role']}>\n{turn['content']}\n</{turn['role']}>" for turn in conversation)


def _read(reply: Reply) -> float:
    labels = set(re.findall(r"\[\[(?:A|B|tie)\]\]", reply.text))
    if len(labels) != 1:
        raise Unreadable(f"{len(labels) or 'no'} verdicts in it")
    return PREFERENCE[labels.pop()]
