"""What a judged benchmark is: questions, how they are answered, what the judge is asked, and what comes of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from aligndistil.benchmarks.files import Files
from aligndistil.judge import Ask, Verdict
from aligndistil.objectives.base import MetricInfo

Values = NDArray[np.float64]
"""(Q,) one number a question, in the benchmark's order; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked."""

    id: str
    turns: tuple[str, ...]
    """What the user says, one after the other; the model answers each."""
    opening: tuple[dict[str, str], ...] = ()
    """Turns before the first of them."""
    temperature: float = 0.0
    """How the benchmark decodes the answer; 0 is greedy."""
    category: str = ""

    def key(self) -> str:
        """SHA-256 of what a model is shown."""
        return hashlib.sha256(json.dumps([self.opening, self.turns]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answers to the turns of one question."""

    turns: tuple[str, ...]
    token_counts: tuple[int, ...] = ()
    """Tokens of each, as the model counts them; empty where the answers were made elsewhere."""
    finished: bool = True
    """False where one of them was cut at the longest length."""
    prompt_cut: bool = False
    """Whether the model was shown only the end of the question, which was longer than it reads."""


Answers = Mapping[str, Answer]
"""By question id."""


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """One model's answers, and one repeat of the verdicts on them."""

    answers: Answers
    verdicts: Mapping[str, Verdict]
    """By the keys of `Benchmark.asks`; a question without a verdict is not in it."""


class HasQuestions(Protocol):
    """Whatever a model may have met in training."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def questions(self) -> Sequence[Question]: ...


class Benchmark(ABC):
    """A judged benchmark with its files read."""

    name: ClassVar[str]
    title: ClassVar[str]
    """What tables call it."""
    metrics: ClassVar[Mapping[str, MetricInfo]]
    """What it measures: names without the benchmark's in front, the most important first. A pairwise one also has
    `position_bias`."""
    pairwise: ClassVar[bool] = False
    """Whether answers are compared with a baseline's, so that a judge that scores can judge it too."""
    baseline: str = ""
    """Whose answers those of a model are compared with."""
    edition: str = ""
    """A hash of what its scores depend on beside questions, answers and verdicts; empty where that is nothing."""
    protocol: str = ""
    """The edition of the benchmark and the prompt of its judge, in words that stand under a table."""
    max_new_tokens: ClassVar[int]
    """Longest answer."""

    def __init__(self, files: Files, limit: int | None = None) -> None:
        """Read what it needs of its files. `limit` asks only the first so many of its questions.

        Raises UserError when a file is not what it should be, MissingError when a package is not installed, and as
        `Files.get` does.
        """
        self.limit = limit
        self.notes: list[str] = []
        """What has to stand under a table of it."""

    @property
    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """In the benchmark's own order, the first `limit` of them."""

    @abstractmethod
    def asks(self, answers: Answers) -> list[Ask]:
        """What the judge is asked about one model's answers; both orders where it is pairwise.

        A key begins with the question's id and a slash.
        """

    @abstractmethod
    def scores(self, models: Mapping[str, JudgedAnswers]) -> dict[str, dict[str, Values]]:
        """By model and metric, what the metric is the mean of: one repeat of all models that are scored together.

        A metric that is no plain mean (a fitted win rate, say) is given by values that have it as their mean, and its
        standard error as theirs. One that cannot be said (a length-controlled win rate of some questions) is left out.
        """

    @abstractmethod
    def write_answers(self, folder: Path, model: str, answers: Answers) -> Path:
        """Write a model's answers as the benchmark's own programs read them, below `folder`; the file."""

    @abstractmethod
    def read_answers(self, path: Path) -> dict[str, Answer]:
        """Read answers that were made elsewhere, in the same format. Raises UserError when they are something else."""

    @abstractmethod
    def write_verdicts(
        self, folder: Path, model: str, judge: str, asks: Sequence[Ask], judged: JudgedAnswers, texts: Mapping[str, str]
    ) -> Path:
        """Write one repeat's verdicts as the benchmark's own programs do, below `folder`; the file."""


def ratio_values(sums: Values, counts: Values) -> Values:
    """(Q,) values whose mean is the ratio of two totals, and whose standard error is the ratio's.

    `sums` and `counts` are (Q,), of each question; the mean over everything that was counted is `sums.sum() /
    counts.sum()`, and its error is that of the delta method (Cochran 1977, Sampling Techniques, 2.11). A question with
    a count of 0 is NaN. Where all counts are the same, a value is the question's own mean.
    """
    values = np.full(len(counts), np.nan)
    held = counts > 0
    if held.any():
        total = counts[held].sum()
        ratio = sums[held].sum() / total
        values[held] = ratio + (sums[held] - counts[held] * ratio) * held.sum() / total
    return values
