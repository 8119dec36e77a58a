"""AlpacaEval 2: win rates against the answers of GPT-4 Turbo, as they are and with the effect of length taken out.

Dubois, Galambosi, Liang and Hashimoto 2024, "Length-Controlled AlpacaEval", https://arxiv.org/abs/2404.04475. The
prompts of the judge and the regression are those of the package `alpaca_eval`; what is asked and kept is in our hands,
since the package leaves out questions whose verdict it could not read.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
from scipy.special import expit

from aligndistil.benchmarks.base import Answer, Answers, Benchmark, JudgedAnswers, Question, Values
from aligndistil.benchmarks.files import BenchmarkFile, Files
from aligndistil.benchmarks.formats import filled, json_rows
from aligndistil.errors import MissingError, UserError, guess_and_list
from aligndistil.files import write_text
from aligndistil.judge import Ask, Compared, Message, Reply, Unreadable, Verdict
from aligndistil.objectives.base import MetricInfo


def hub_file(name: str, sha256: str = "") -> BenchmarkFile:
    """A file of AlpacaEval's data set, at the revision that all of them are read from."""
    return BenchmarkFile(
        name, f"hf:tatsu-lab/alpaca_eval@2edc6fad8be6b14ea7230aabfd08188da6b8b814:{name}", sha256=sha256
    )


BASELINE = hub_file(
    "alpaca_eval_gpt4_baseline.json", "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4"
)
"""The questions, and the answers that a model's are compared with."""
GAMED = hub_file("df_gamed.csv", "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d")
"""How hard each question is, and verdicts on the baseline when it is told to be brief or to be long."""
QUESTIONS = 805


class Reading(NamedTuple):
    """How a judge is asked which of two outputs is better, and what its reply comes to."""

    prompt: str
    """A file among the evaluators of the package `alpaca_eval`."""
    read: Callable[[Reply], float]
    """From 1, the output that is shown first is better, to 0."""
    max_tokens: int
    temperature: float
    top_logprobs: int = 0


class Pair(NamedTuple):
    """Two outputs for one instruction."""

    id: str
    instruction: str
    output_1: str
    output_2: str


class Comparison:
    """Asks of AlpacaEval's kind which output of a pair is better, in both orders, and what the verdicts come to.

    AlpacaEval shows each pair in one order, drawn at random; both cost twice as much, and cancel a preference for the
    output that is shown first. As there, a pair of equal outputs is a tie, and nobody is asked.
    """

    def __init__(self, reading: str, orders: tuple[str, str]) -> None:
        """`reading` is one of READINGS; `orders` say in a key that the first or the second output is shown first.

        Raises UserError for another reading, MissingError when the package `alpaca_eval` is not installed.
        """
        if reading not in READINGS:
            raise UserError(f"AlpacaEval: `{reading}` is no reading{guess_and_list(reading, READINGS, 'readings')}")
        self.reading, self.orders = READINGS[reading], orders
        prompt = Path(package("constants").EVALUATORS_CONFIG_DIR) / self.reading.prompt
        self._template: list[Message] = package("utils").prompt_to_chatml(prompt.read_text(encoding="utf-8"))

    def asks(self, pairs: Sequence[Pair]) -> list[Ask]:
        """Two of each pair, `ID/ORDER`; none where its outputs are equal."""
        reading, asks = self.reading, []
        for pair in pairs:
            both = (pair.output_1, pair.output_2)
            for order, (first, second) in zip(self.orders, (both, both[::-1]), strict=True):
                if first == second:
                    continue
                texts = {"instruction": pair.instruction, "output_1": first, "output_2": second}
                asks.append(
                    Ask(
                        f"{pair.id}/{order}",
                        [{**turn, "content": filled(turn["content"], texts)} for turn in self._template],
                        reading.read,
                        max_tokens=reading.max_tokens,
                        temperature=reading.temperature,
                        top_logprobs=reading.top_logprobs,
                        compared=Compared([{"role": "user", "content": pair.instruction}], first, second),
                    )
                )
        return asks

    def preferences(self, pairs: Sequence[Pair], verdicts: Mapping[str, Verdict]) -> Values:
        """(P,) how far the second output is preferred, from 0 to 1; NaN where one of the two verdicts is missing."""
        first = self._of_first(pairs, verdicts)
        equal = [pair.output_1 == pair.output_2 for pair in pairs]
        return np.where(equal, 0.5, (1 - first[:, 0] + first[:, 1]) / 2)

    def position_bias(self, pairs: Sequence[Pair], verdicts: Mapping[str, Verdict]) -> Values:
        """(P,) how far the output shown first is preferred, from -0.5 to 0.5; NaN where a verdict is missing."""
        bias: Values = self._of_first(pairs, verdicts).mean(axis=1) - 0.5
        return bias

    def _of_first(self, pairs: Sequence[Pair], verdicts: Mapping[str, Verdict]) -> Values:
        keys = [[f"{pair.id}/{order}" for order in self.orders] for pair in pairs]
        found = [[float(verdicts.get(key, np.nan)) for key in of_pair] for of_pair in keys]
        return np.array(found, dtype=np.float64).reshape(len(pairs), 2)


class AlpacaEval(Benchmark):
    """Win rates against GPT-4 Turbo's answers to 805 instructions.

    The benchmark leaves it to each model how it decodes; here it samples at temperature 0.7.
    """

    name = "alpaca_eval"
    title = "AlpacaEval 2"
    pairwise = True
    baseline = "gpt4_1106_preview"
    max_new_tokens = 2048
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "lc_win_rate": MetricInfo(
            "%",
            "length-controlled win rate: what a regression (`length_controlled_v1` of AlpacaEval) says of answers as "
            "long as the baseline's; only of all 805 questions",
            better="more",
        ),
        "win_rate": MetricInfo(
            "%", "how far the judge prefers the model's answers to the baseline's, in both orders", better="more"
        ),
        "position_bias": MetricInfo(
            "points", "how far the judge prefers the answer that it is shown first; 0 is not at all"
        ),
        "length": MetricInfo("characters", "mean length of the model's answers as text"),
    }

    def __init__(self, files: Files, limit: int | None = None, reading: str = "weighted") -> None:
        """`reading` is how the judge replies: "weighted", by the probabilities of its first token, or "ranking"."""
        super().__init__(files, limit)
        package("metrics.glm_winrate")
        self._comparison = Comparison(reading, ("baseline-first", "model-first"))
        self._rows = _outputs(json_rows(files.get(BASELINE), BASELINE.name), BASELINE.name)
        if len(self._rows) != QUESTIONS:
            raise UserError(
                f"{BASELINE.name} has {len(self._rows)} instructions and AlpacaEval has {QUESTIONS}; "
                f"it is to be had at {BASELINE.address}"
            )
        self.limit = None if limit is None or limit >= QUESTIONS else limit
        self._questions = [
            Question(str(i), (row["instruction"],), temperature=0.7, category=row.get("dataset", ""))
            for i, row in enumerate(self._rows[:limit])
        ]
        self.protocol = f"{self._comparison.reading.prompt} of alpaca_eval {version('alpaca_eval')}"
        self._gamed: bytes | None = None
        if len(self._questions) < QUESTIONS:
            self.notes.append(f"AlpacaEval has a length-controlled win rate of all {QUESTIONS} questions only.")
            return
        try:
            self._gamed = files.get(GAMED)
        except UserError as error:  # the verdicts still make a win rate
            self.protocol += ", without length control"
            self.notes.append(f"No length-controlled win rate: {error}.")
            return
        self.edition = hashlib.sha256(self._gamed).hexdigest()
        table = pd.read_csv(io.BytesIO(self._gamed))
        # The difficulty of a question is looked up by its number among the first lines, which are one a question.
        if not {*COLUMNS} <= {*table} or table["index"][:QUESTIONS].nunique() < QUESTIONS:
            raise UserError(
                f"{GAMED.name} does not have the columns {', '.join(COLUMNS)} and a line for each of {QUESTIONS} "
                f"questions first; it is to be had at {GAMED.address}"
            )

    @property
    def questions(self) -> Sequence[Question]:
        return self._questions

    def asks(self, answers: Answers) -> list[Ask]:
        return self._comparison.asks(self._pairs(answers))

    def scores(self, models: Mapping[str, JudgedAnswers]) -> dict[str, dict[str, Values]]:
        return {name: self._scores(judged) for name, judged in models.items()}

    def _scores(self, judged: JudgedAnswers) -> dict[str, Values]:
        pairs = self._pairs(judged.answers)
        preferences = self._comparison.preferences(pairs, judged.verdicts)
        values = {
            "win_rate": 100 * preferences,
            "position_bias": 100 * self._comparison.position_bias(pairs, judged.verdicts),
            "length": np.array([len(pair.output_2) for pair in pairs], dtype=np.float64),
        }
        if self._gamed is None:
            return values
        return {"lc_win_rate": self._length_controlled(pairs, preferences, self._gamed), **values}

    def _length_controlled(self, pairs: Sequence[Pair], preferences: Values, gamed: bytes) -> Values:
        """(Q,) what the regression says of each question, in percent: of those without a verdict too."""
        if np.isnan(preferences).all():
            return preferences
        rows = pd.DataFrame(pairs, columns=[*Pair._fields])
        # Outputs of equal length have no spread to divide by. A model of the baseline's name is even by definition.
        is_baseline = bool((rows["output_1"] == rows["output_2"]).all())
        rows = rows.assign(
            generator_1=self.baseline,
            generator_2=self.baseline if is_baseline else "model",
            annotator="judge",
            preference=1 + preferences,
        )
        glm = package("metrics.glm_winrate")
        with (
            quiet(),
            glm.sklearn.config_context(),  # the fit switches metadata routing on, and leaves it on
            patch.object(glm, "hf_hub_download", lambda **_: io.BytesIO(gamed)),
        ):
            glm.get_length_controlled_winrate(rows, save_weights_dir=None, is_warn_extreme_changes=False)
        values: Values = 100 * rows["glm_preference"].to_numpy(dtype=np.float64)
        return values

    def _pairs(self, answers: Answers) -> list[Pair]:
        return [
            Pair(question.id, row["instruction"], row["output"], answers[question.id].turns[-1])
            for question, row in zip(self._questions, self._rows, strict=False)  # a slice has fewer questions
        ]

    def write_answers(self, folder: Path, model: str, answers: Answers) -> Path:
        """MODEL/model_outputs.json, as on AlpacaEval's leaderboard."""
        rows = [
            {
                "dataset": question.category,
                "instruction": question.turns[0],
                "output": answers[question.id].turns[-1],
                "generator": model,
            }
            for question in self._questions
        ]
        return _write_rows(folder / model / "model_outputs.json", rows)

    def read_answers(self, path: Path) -> dict[str, Answer]:
        """Matched by instruction, in any order; `.jsonl` has a row a line."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if path.suffix == ".jsonl":
            content = b"[" + b",".join(line for line in content.splitlines() if line.strip()) + b"]"
        rows = _outputs(json_rows(content, str(path)), str(path))
        # Other programs strip the few instructions that end in a space.
        outputs = {row["instruction"].strip(): row["output"] for row in rows}
        missing = [question.id for question in self._questions if question.turns[0].strip() not in outputs]
        known = {row["instruction"].strip() for row in self._rows}
        unknown = [instruction for instruction in outputs if instruction not in known]
        if missing or unknown or len(outputs) < len(rows):
            raise UserError(
                f"{path}: {len(missing)} of {len(self._questions)} instructions of AlpacaEval have no output in it, "
                f"{len(unknown)} of its instructions are not AlpacaEval's and {len(rows) - len(outputs)} are there "
                "again; give one row for each instruction"
            )
        return {question.id: Answer((outputs[question.turns[0].strip()],)) for question in self._questions}

    def write_verdicts(
        self, folder: Path, model: str, judge: str, asks: Sequence[Ask], judged: JudgedAnswers, texts: Mapping[str, str]
    ) -> Path:
        """MODEL/annotations.json, as on AlpacaEval's leaderboard; `preference` is from 1, the baseline's, to 2."""
        pairs = self._pairs(judged.answers)
        preferences = self._comparison.preferences(pairs, judged.verdicts)
        rows = [
            {
                "instruction": pair.instruction,
                "output_1": pair.output_1,
                "generator_1": self.baseline,
                "output_2": pair.output_2,
                "generator_2": model,
                "annotator": judge,
                "preference": None if np.isnan(preference) else 1 + float(preference),
                "raw_completion": {order: texts.get(f"{pair.id}/{order}") for order in self._comparison.orders},
            }
            for pair, preference in zip(pairs, preferences, strict=True)
        ]
        return _write_rows(folder / model / "annotations.json", rows)


COLUMNS = ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
"""Of the file of gamed baselines."""


def _outputs(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not (isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)):
            raise UserError(f"{name}: row {number} has no `instruction` and `output` that are text")
    return rows


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    write_text(path, json.dumps(rows, indent=2) + "\n")
    return path


def _weighted(reply: Reply) -> float:
    """The probability of "m", the output shown first, of that of "m" or "M"."""
    found = {token: reply.logprobs[token] for token in ("m", "M") if reply.logprobs.get(token, -np.inf) > -np.inf}
    if not found:
        raise Unreadable("neither `m` nor `M` is among the likeliest first tokens")
    return float(expit(found.get("m", -np.inf) - found.get("M", -np.inf)))


def _ranking(reply: Reply) -> float:
    if not reply.text.strip():
        raise Unreadable("it is empty")
    with quiet():
        [rank] = package("completion_parsers").ranking_parser(reply.text)
    if np.isnan(rank):
        raise Unreadable("it is not a list of the two models with their ranks")
    return 2 - float(rank)


READINGS = {
    "weighted": Reading("alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt", _weighted, 1, 1.0, top_logprobs=5),
    "ranking": Reading("alpaca_eval_gpt4/alpaca_eval.txt", _ranking, 100, 0.0),
}
"""Those of the package's `weighted_alpaca_eval_gpt4_turbo` and `alpaca_eval_gpt4`. The temperature of the first does
not matter: what is read is the probabilities before it."""


_GLOBAL = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the package's log lines, which go to the root logger, and warnings; one thread at a time."""
    with _GLOBAL, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def package(module: str) -> Any:
    """A module of the package `alpaca_eval`. Raises MissingError when something of it is not installed."""
    with quiet():
        # The package imports `pkg_resources` for functions that are not called here, and newer setuptools have none.
        stands_in = "alpaca_eval" not in sys.modules and find_spec("pkg_resources") is None
        if stands_in:
            sys.modules["pkg_resources"] = ModuleType("pkg_resources")
        try:
            return importlib.import_module(f"alpaca_eval.{module}")
        except ModuleNotFoundError as error:
            raise MissingError(
                f'AlpacaEval needs {error.name}, which is not installed: run `pip install "aligndistil[eval]"`'
            ) from None
        finally:
            if stands_in:
                del sys.modules["pkg_resources"]
