"""Arena-Hard v0.1 (Li et al. 2024, arXiv 2406.11939): 500 prompts of users, answers compared with those of gpt-4-0314.

The protocol and the numbers are those of the authors' programs of December 2024 (commit 2971e34): the win rate of a
Bradley-Terry fit, and the same with the style of the answers in the fit ("style control"). Differences: a judge whose
text has several labels, or one that is none of the five, is asked again (there it has no verdict); the style-controlled
fit runs to its end (there it stops a few thousandths of a point earlier); and errors are those over questions (the
bootstrap there takes the two orders of a question, and the three times that a clear verdict counts, for independent).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import yaml
from scipy import optimize
from scipy.special import expit

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
from aligndistil.errors import MissingError, UserError, listed
from aligndistil.judge import Ask, Compared, Reply, Unreadable
from aligndistil.objectives.base import MetricInfo

_REPOSITORY = "https://raw.githubusercontent.com/lmarena/arena-hard-auto/2971e34d066f986c09bc5a463fa286fa93bcca3c"
QUESTIONS = BenchmarkFile(
    "arena_hard_questions.jsonl",
    f"{_REPOSITORY}/data/arena-hard-v0.1/question.jsonl",
    "4daad38811161c3ba5c248f26b90c3cef89634f4c772002ed9138c1e13f63e9f",
    also=("2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f",),
)
BASELINE = BenchmarkFile(
    "arena_hard_answers_gpt-4-0314.jsonl",
    f"{_REPOSITORY}/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
    "245109b8fe7c3bef0304f1c559d29da377f97f61535ad1170b46a61a08eb9ac7",
    also=("0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2",),
)
CONFIG = BenchmarkFile(
    "arena_hard_judge_config.yaml",
    f"{_REPOSITORY}/config/judge_config.yaml",
    "6e001736bacacdb1591ffca7eec953a7089f8f5604872d1ca4f9a6f9de1ee451",
)
COUNT = 500
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
"""What a verdict is worth to the answer that was shown first, and how many times it counts."""
REMINDER = f"Go on with your judgment, and end it with the label of one final verdict: [[{']], [['.join(LABELS)}]]."
MARKDOWN = {
    "header_count": {f"h{level}": rf"^#{{{level}}}\s" for level in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}
"""What is counted in an answer, beside its tokens, for its style."""
LN_10 = math.log(10)
"""Strengths are in powers of ten, as Elo's: the scale decides how much the penalty of the fit weighs."""
Metadata: TypeAlias = dict[str, Any]
"""`token_len`, and the names of MARKDOWN with their counts: `conv_metadata` of the authors' files."""


class ArenaHard(Benchmark):
    """Prompts of one turn; the judge sees both answers in either order, and says which is better, and whether by far.

    Lengths are in tokens of tiktoken's cl100k_base. Where its vocabulary cannot be had, they are characters divided by
    4, of every answer and the baseline's: two measures in one comparison would be a difference in style by themselves.
    """

    name = "arena_hard"
    title = "Arena-Hard"
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "win_rate": MetricInfo(
            "%",
            "how often the judge prefers the model's answer to the baseline's: a tie is a half, and what is better by "
            "far counts three times",
            better="more",
        ),
        "style_controlled_win_rate": MetricInfo(
            "%",
            "the win rate at the mean difference in style (length, headers, lists and bold text) over all comparisons "
            "of the models that are fitted together",
            better="more",
        ),
        "position_bias": MetricInfo(
            "points", "how far the judge prefers the answer that it is shown first; 0 is not at all"
        ),
        "length": MetricInfo("tokens", "mean length of the model's answers"),
    }
    pairwise = True
    baseline = "gpt-4-0314"
    protocol = "v0.1 of December 2024 (commit 2971e34)"
    max_new_tokens = 4096

    def __init__(self, files: Files, limit: int | None = None) -> None:
        super().__init__(files, limit)
        try:
            import tiktoken
        except ImportError:
            raise MissingError(
                'Arena-Hard needs tiktoken, which is not installed: run `pip install "aligndistil[eval]"`'
            ) from None
        try:
            every = [_question(line) for line in json_lines(files.get(QUESTIONS), QUESTIONS.name)]
            self._ids = {question.id for question in every}
            if len(self._ids) != COUNT:
                raise ValueError(f"it has {len(self._ids)} questions, not {COUNT}")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{QUESTIONS.name} is not that of Arena-Hard ({error}); it is to be had at {QUESTIONS.address}"
            ) from None
        self.limit = None if limit is None or limit >= COUNT else limit
        self._questions = every[:limit]
        answers = _answers(json_lines(files.get(BASELINE), BASELINE.name), BASELINE.name)
        self._baseline = complete(answers, self._ids, self, BASELINE.name)
        try:
            config = yaml.safe_load(files.get(CONFIG))
            self._system, self._templates = config["system_prompt"], list(config["prompt_template"])
            self._label = re.compile(config["regex_pattern"])
        except (yaml.YAMLError, re.error, KeyError, TypeError) as error:
            raise UserError(
                f"{CONFIG.name} is not that of Arena-Hard ({error}); it is to be had at {CONFIG.address}"
            ) from None
        try:
            encoding = tiktoken.get_encoding("cl100k_base")
        except (OSError, ValueError) as error:  # errors of `requests` are an OSError; a changed file is a ValueError
            self._tokens: Callable[[str], int] = lambda text: round(len(text) / 4)
            self.notes.append(
                "Arena-Hard: lengths in tokens are characters / 4, also in the style control and of the baseline: the "
                f"vocabulary of tiktoken's cl100k_base cannot be had ({type(error).__name__})."
            )
        else:
            self._tokens = lambda text: len(encoding.encode(text, disallowed_special=()))
            self.notes.append("Arena-Hard: lengths are in tokens of tiktoken's cl100k_base.")
        self._known: dict[str, Metadata] = {}

    @property
    def questions(self) -> Sequence[Question]:
        return self._questions

    def asks(self, answers: Answers) -> list[Ask]:
        """Keys are `ID/game-1`, where the baseline is A, and `ID/game-2`, where it is B; verdicts are labels."""
        asks = []
        for question in self._questions:
            [prompt] = question.turns
            own, other = answers[question.id].turns[0], self._baseline[question.id].turns[0]
            for game, (first, second) in enumerate(((other, own), (own, other)), 1):
                values = {"question_1": prompt, "answer_1": first, "answer_2": second}
                users = [{"role": "user", "content": filled(template, values)} for template in self._templates]
                asks.append(
                    Ask(
                        f"{question.id}/game-{game}",
                        [{"role": "system", "content": self._system}, *users],
                        self._read,
                        max_tokens=4096,
                        reminder=REMINDER,
                        compared=Compared([{"role": "user", "content": prompt}], first, second),
                        of_preference={1.0: "A>B", 0.5: "A=B", 0.0: "B>A"}.__getitem__,
                    )
                )
        return asks

    def _read(self, reply: Reply) -> str:
        found: set[str] = {label.strip("\n") for label in self._label.findall(reply.text) if label}
        if len(found) > 1:
            raise Unreadable(f"it has several labels: {', '.join(sorted(found))}")
        if not found & {*LABELS}:
            raise Unreadable(f"it has none of the labels {', '.join(LABELS)}")
        return found.pop()

    def scores(self, models: Mapping[str, JudgedAnswers]) -> dict[str, dict[str, Values]]:
        """What is scored together is fitted together for the style-controlled win rates.

        The plain win rate needs no fit: since a model meets the baseline alone, that of the Bradley-Terry strengths is
        the share of its comparisons. A comparison without a verdict is left out.
        """
        keys = [question.id for question in self._questions]
        shape = (len(models), len(keys), 2)
        of_first, times = np.zeros(shape), np.zeros(shape)
        for m, judged in enumerate(models.values()):
            for q, key in enumerate(keys):
                for game in (0, 1):
                    if label := judged.verdicts.get(f"{key}/game-{game + 1}"):
                        of_first[m, q, game], times[m, q, game] = LABELS[str(label)]
        of_model = np.stack([1 - of_first[..., 0], of_first[..., 1]], axis=-1)
        wins, counts = (times * of_model).sum(axis=-1), times.sum(axis=-1)
        style = np.array([[self._style(judged.answers[key]) for key in keys] for judged in models.values()])
        of_baseline = np.array([self._style(self._baseline[key]) for key in keys])
        controlled = style_controlled(wins, counts, (style - of_baseline) / (style + of_baseline + 1))
        judged_once = times > 0
        bias = (judged_once * (of_first - 0.5)).sum(axis=-1)
        about = "they are at the mean difference in style of all of them, and change with the models in it"
        if len(models) == 1:
            about = "it is at this model's own mean difference in style, so give it other models beside it"
        self.notes = [
            self.notes[0],
            f"Arena-Hard: style-controlled win rates are of one fit of {listed(models)}; {about}.",
        ]
        return {
            name: {
                "win_rate": 100 * ratio_values(wins[m], counts[m]),
                "style_controlled_win_rate": 100 * controlled[m],
                "position_bias": 100 * ratio_values(bias[m], judged_once[m].sum(axis=-1)),
                "length": style[m, :, 0],
            }
            for m, name in enumerate(models)
        }

    def _metadata(self, text: str) -> Metadata:
        """Tokens, headers, lists and bold text, as the authors' add_markdown_info.py counts them."""
        if text not in self._known:
            plain = text
            for inside in re.findall("```([^`]*)```", text):
                plain = plain.replace(inside, "")  # wherever it is: their count is what the leaderboard is of
            counts = {
                name: {kind: len(re.findall(pattern, plain, re.MULTILINE)) for kind, pattern in patterns.items()}
                for name, patterns in MARKDOWN.items()
            }
            self._known[text] = {"token_len": self._tokens(text), **counts}
        return self._known[text]

    def _style(self, answer: Answer) -> list[float]:
        found = self._metadata(answer.turns[0]).values()
        return [float(sum(count.values()) if isinstance(count, dict) else count) for count in found]

    def write_answers(self, folder: Path, model: str, answers: Answers) -> Path:
        """`model_answer/MODEL.jsonl` of December 2024, and beside it the baseline's with the same measure of length."""
        for name, of_model in ((self.baseline, self._baseline), (model, answers)):
            path = folder / "model_answer" / f"{name}.jsonl"
            lines = []
            for question in self._questions:
                [text] = of_model[question.id].turns
                lines.append(
                    {
                        "question_id": question.id,
                        "answer_id": answer_id(name, [text]),
                        "model_id": name,
                        "choices": [{"index": 0, "turns": [{"content": text}]}],
                        "tstamp": time.time(),
                        "conv_metadata": self._metadata(text),
                    }
                )
            write_json_lines(path, lines)
        return path

    def read_answers(self, path: Path) -> dict[str, Answer]:
        """`model_answer/MODEL.jsonl` of December 2024, or of 2025."""
        return complete(_answers(read_json_lines(path), path), self._ids, self, path)

    def write_verdicts(
        self, folder: Path, model: str, judge: str, asks: Sequence[Ask], judged: JudgedAnswers, texts: Mapping[str, str]
    ) -> Path:
        """`model_judgment/JUDGE/MODEL.jsonl` of December 2024; a score of null is no verdict."""
        path = folder / "model_judgment" / judge / f"{model}.jsonl"
        games: dict[str, list[dict[str, Any]]] = {}
        for ask in asks:
            prompt = ask.messages[1]["content"]
            game = {"user_prompt": prompt, "judgment": texts.get(ask.key, ""), "score": judged.verdicts.get(ask.key)}
            games.setdefault(ask.key.split("/game-")[0], []).append(game)
        write_json_lines(
            path, [{"question_id": id, "model": model, "judge": judge, "games": both} for id, both in games.items()]
        )
        return path


def _question(line: Mapping[str, Any]) -> Question:
    if "uid" in line:  # the layout of 2025
        return Question(line["uid"], (line["prompt"],))
    [turn] = line["turns"]
    return Question(line["question_id"], (turn["content"],))


def _answers(lines: Sequence[Mapping[str, Any]], where: str | Path) -> dict[str, Answer]:
    answers = {}
    for number, line in enumerate(lines, 1):
        try:
            if "uid" in line:  # the layout of 2025
                id, text = line["uid"], line["messages"][-1]["content"]["answer"]
            else:
                id, text = line["question_id"], line["choices"][0]["turns"][0]["content"]
            if not isinstance(text, str):
                raise TypeError
            answers[id] = Answer((text,))
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{where}: answer {number} has no `question_id` and `choices`, nor `uid` and `messages`; answers to "
                "Arena-Hard have the format of its own gen_answer.py"
            ) from None
    return answers


def style_controlled(wins: Values, counts: Values, styles: Values) -> Values:
    """(M, Q) values whose means are the M models' win rates against the baseline with style in the fit, from 0 to 1.

    Args:
        wins: (M, Q) how many comparisons of a question a model won, a tie being a half.
        counts: (M, Q) of how many.
        styles: (M, Q, K) by how much the style of the model's answer differs from that of the baseline's.

    The values are those of the jackknife: of the fit without each question, moved so that their mean is that of the fit
    with all. Their standard error is the jackknife's (Efron and Stein 1981, Annals of Statistics 9, 586-596). A
    question without any comparison is NaN, and so is all of a model without any.
    """
    values = np.full(counts.shape, np.nan)
    held = np.flatnonzero(counts.sum(axis=0))
    if held.size:
        fit = _fit(wins, counts, styles, np.zeros(1 + len(wins) + styles.shape[-1]))
        values[:, held] = _win_rates(fit, len(wins))[:, None]
    if held.size > 1:
        without = np.empty((len(wins), held.size))
        for i, q in enumerate(held):
            rest = np.arange(counts.shape[1]) != q
            without[:, i] = _win_rates(_fit(wins[:, rest], counts[:, rest], styles[:, rest], fit), len(wins))
        values[:, held] += (held.size - 1) * (without.mean(axis=1, keepdims=True) - without)
    values[counts.sum(axis=1) == 0] = np.nan
    return values


def _win_rates(fit: Values, models: int) -> Values:
    """(M,) against the baseline, at the mean style difference."""
    rates: Values = expit(LN_10 * (fit[1 : 1 + models] - fit[0]))
    return rates


def _fit(wins: Values, counts: Values, styles: Values, start: Values) -> Values:
    """(1 + M + K,) strengths of the baseline and the models, and what a standard deviation of each style is worth.

    Logistic regression with the penalty of half the squared norm. As in the authors' program, each comparison is in it
    twice (a tie once as won, once as lost), and style differences are less their mean, over their standard deviation,
    over all comparisons.
    """
    models, questions, _ = styles.shape
    share = counts[..., None] / counts.sum()
    centred = styles - (share * styles).sum(axis=(0, 1))
    spread = np.sqrt((share * centred**2).sum(axis=(0, 1)))
    z = centred / np.where(spread > 1e-12, spread, np.inf)  # what is the same everywhere says nothing
    strength = np.repeat(LN_10 * np.hstack([-np.ones((models, 1)), np.eye(models)]), questions, axis=0)
    x = np.hstack([strength, z.reshape(len(strength), -1)])
    won, n = 2 * wins.reshape(-1), 2 * counts.reshape(-1)

    def loss(beta: Values) -> tuple[float, Values]:
        logit = x @ beta
        value = beta @ beta / 2 + n @ np.logaddexp(0, logit) - won @ logit
        return float(value), beta + x.T @ (n * expit(logit) - won)

    def curvature(beta: Values) -> Values:
        p = expit(x @ beta)
        hessian: Values = np.eye(len(beta)) + x.T @ (x * (n * p * (1 - p))[:, None])
        return hessian

    found = optimize.minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-7})
    coefficients: Values = found.x
    return coefficients
