"""Models on one benchmark: their answers, the verdicts on them, and what comes of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from aligndistil.benchmarks.answers import Answerer, AnswerStore, Decoding
from aligndistil.benchmarks.base import Answers, Benchmark, HasQuestions, JudgedAnswers, Values
from aligndistil.benchmarks.contamination import find, note, refusal, training_data
from aligndistil.engine.processes import Processes
from aligndistil.errors import ServiceError, UserError, listed
from aligndistil.files import write_text
from aligndistil.judge import Judge, Judged, Usage
from aligndistil.models import check_language_model, load_tokenizer, pick_dtype
from aligndistil.objectives.base import MetricInfo
from aligndistil.progress import Steps
from aligndistil.recipe import Model

_T = TypeVar("_T")

SPREAD = "repeat_spread"
COMMON_METRICS = {
    SPREAD: MetricInfo(
        "", "largest less smallest value of the benchmark's first metric over the repeats of the judging"
    ),
}
"""Of every benchmark that a judge may say something else of when it is asked again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is evaluated."""

    name: str
    """What tables and files call it."""
    path: str
    """Its folder or Hub id; or a file of answers that were made elsewhere."""
    section: Model
    """How it is loaded."""
    identity: str = ""
    """A hash of its weights; empty where the answers were made elsewhere."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelScores(_Closed):
    """What came of one model."""

    metrics: dict[str, float]
    """Means over questions and repeats."""
    values: dict[str, list[float | None]]
    """What each metric is the mean of, question by question; null where there is no verdict."""
    repeats: dict[str, list[float]]
    """Each metric in each repeat of the judging."""
    missing: dict[str, str] = {}
    """By question and what was asked of it, why there is no verdict."""


class BenchmarkResults(_Closed):
    """BENCHMARK/results.json."""

    key: str
    """A hash of the answers, the judge and the questions."""
    benchmark: str
    title: str
    models: dict[str, ModelScores]
    notes: list[str]
    """What stands under a table: judge, prompt, decoding, date, and what is not as it should be."""
    usage: str = ""
    """What judging took."""

    def metrics(self, model: str) -> dict[str, float]:
        """Of one model, as reports call them: `alpaca_eval/win_rate`."""
        return {f"{self.benchmark}/{metric}": value for metric, value in self.models[model].metrics.items()}

    def values(self, model: str) -> dict[str, list[float]]:
        """What they are means of, question by question; of those metrics that have a value for every question."""
        whole = {
            metric: [value for value in values if value is not None]
            for metric, values in self.models[model].values.items()
        }
        complete = {metric: len(values) for metric, values in self.models[model].values.items()}
        return {f"{self.benchmark}/{m}": values for m, values in whole.items() if len(values) == complete[m]}


def collect_answers(
    benchmark: Benchmark, candidates: Sequence[Candidate], folder: Path, decoding: Decoding, processes: Processes
) -> dict[str, Answers]:
    """The answers of each model, sampled where they are not there yet, in `folder` and in the benchmark's own format.

    Collective. Raises UserError when a model cannot be asked, or a file of answers is none.
    """
    found: dict[str, Answers] = {}
    for candidate in candidates:
        if not candidate.identity:
            found[candidate.name] = benchmark.read_answers(Path(candidate.path))
            continue
        answerer = Answerer(candidate.path, candidate.section, decoding, processes)
        kwargs = candidate.section.chat_template_kwargs
        template = str(answerer.tokenizer.chat_template) + (json.dumps(kwargs, sort_keys=True) if kwargs else "")
        template = hashlib.sha256(template.encode()).hexdigest()
        dtype, attention = pick_dtype(candidate.section.dtype), candidate.section.attn_implementation
        depends_on = f"{candidate.identity} {template} {dtype} {attention}"
        store = AnswerStore(folder / "sampled" / f"{file_name(candidate.name)}.jsonl", depends_on, decoding)
        what = f"{benchmark.name}: {candidate.name} answers"
        done = len(store.read(benchmark.questions))
        total = len(benchmark.questions)
        with Steps(what, total, start=min(done, total), unit="questions", rank=processes.rank) as steps:
            found[candidate.name] = answerer.answer(benchmark.questions, store, benchmark.name, steps.advance)
        if processes.is_main:
            benchmark.write_answers(folder, file_name(candidate.name), found[candidate.name])
    return found


def check_candidates(candidates: Sequence[Candidate], benchmarks: Sequence[Benchmark]) -> None:
    """Refuse models that cannot be asked, before the first of them is.

    Raises UserError for one with a scalar head, or without the chat template that conversations need.
    """
    for candidate in candidates:
        if candidate.identity:
            check_language_model(candidate.path, candidate.section)
            tokenizer = load_tokenizer(candidate.path, candidate.section)
            for benchmark in benchmarks:
                if tokenizer.chat_template is None and any(len(q.turns) > 1 or q.opening for q in benchmark.questions):
                    raise UserError(
                        f"{candidate.name} has no chat template, and questions of {benchmark.title} are conversations: "
                        "leave it out, or give its tokenizer one"
                    )


def check_training_data(
    candidates: Sequence[Candidate], benchmarks: Sequence[HasQuestions], *, allowed: bool
) -> list[str]:
    """Look for the questions in what the models were trained on; what has to stand under a table.

    Raises UserError for a model that was trained on them, unless that is allowed.
    """
    notes, unknown = [], []
    for candidate in candidates:
        known = training_data(candidate.path)
        if known is None:
            unknown.append(candidate.name)
            continue
        for benchmark in benchmarks:
            found = find(known, benchmark.questions, benchmark.name)
            if not allowed and (why := refusal(found, benchmark.title, candidate.name)) is not None:
                raise UserError(why)
            notes += [sentence] if (sentence := note(found, benchmark.title, candidate.name)) else []
    if unknown and benchmarks:
        notes.append(f"What {listed(unknown)} was trained on is not known here: it may have met the questions.")
    return notes


def judge_answers(
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    answers: Mapping[str, Answers],
    judge: Judge,
    repeats: int,
    folder: Path,
    decoding: Decoding,
    *,
    allow_missing: bool = False,
) -> BenchmarkResults:
    """Judge the answers of all models, unless the same judge has judged the same, and write what it said.

    Raises UserError when this judge cannot judge this benchmark, ServiceError when it cannot be reached, or when
    verdicts are missing and that is not allowed; what it has said so far is kept.
    """
    repeats = 1 if judge.scores_only else repeats
    asks = {candidate.name: benchmark.asks(answers[candidate.name]) for candidate in candidates}
    # What the judge is shown holds the baseline's answers, and the prompt.
    shown = {name: [(ask.key, ask.messages) for ask in of_model] for name, of_model in asks.items()}
    plain = {name: {key: asdict(answer) for key, answer in of_model.items()} for name, of_model in answers.items()}
    about = [benchmark.name, benchmark.baseline, benchmark.protocol, benchmark.edition, decoding.max_new_tokens]
    key = hashlib.sha256(json.dumps([about, judge.key, repeats, plain, shown]).encode()).hexdigest()
    file = folder / "results.json"
    if (known := _read(file)) is not None and known.key == key and (allow_missing or not _missing(known.models)):
        return known.model_copy(update={"usage": "nothing was asked that was not known"})
    # One pool for all models: a slow question of one does not hold up the others.
    pool = [replace(ask, key=f"{name}\x1f{ask.key}") for name, of_model in asks.items() for ask in of_model]
    with Steps(f"{benchmark.name}: judging", len(pool) * repeats, unit="verdicts") as steps:

        def on_progress(done: int, usage: Usage) -> None:
            cost = {"cost": f"${usage.dollars:.2f}"} if usage.dollars else {}
            retries = {"retries": str(usage.retries)} if usage.retries else {}
            steps.advance(done - steps.done, cost | retries)

        whole = judge.ask(pool, repeats, benchmark.name, on_progress)
    judged = {name: _of_model(whole, name) for name in asks}
    scored: list[dict[str, dict[str, Values]]] = []
    for k in range(repeats):
        of_repeat = {name: JudgedAnswers(answers[name], judged[name].verdicts[k]) for name in asks}
        scored.append(benchmark.scores(of_repeat))
        if judge.scores_only:  # it sees no order
            for of_model in scored[-1].values():
                of_model.pop("position_bias", None)
        for candidate in candidates:
            name = candidate.name
            place = folder if repeats == 1 else folder / f"repeat-{k + 1}"
            benchmark.write_verdicts(
                place,
                file_name(candidate.name),
                file_name(judge.name),
                asks[name],
                of_repeat[name],
                judged[name].texts[k],
            )
    models = {name: _scores([of_repeat[name] for of_repeat in scored], judged[name].missing) for name in asks}
    results = BenchmarkResults(
        key=key,
        benchmark=benchmark.name,
        title=benchmark.title,
        models=models,
        notes=_notes(benchmark, candidates, answers, models, judge, repeats, decoding),
        usage=_used(whole.usage),
    )
    write_text(file, results.model_dump_json() + "\n")
    if empty := [name for name in asks if not models[name].metrics]:
        raise ServiceError(f"{benchmark.name}: there is no verdict at all on {empty[0]}: {_missing(models)}")
    if not allow_missing and (sentence := _missing(models)):
        raise ServiceError(
            f"{benchmark.name}: {sentence}; the same command asks for them again, and --allow-missing (in a recipe "
            "`report.allow_missing`) makes a table without them that says so"
        )
    return results


def file_name(name: str) -> str:
    """The name of a model or judge, as a file may be called."""
    return re.sub(r"[^\w.@-]+", "--", name).lstrip(".") or "model"


def _of_model(judged: Judged, name: str) -> Judged:
    """The part of the pool that is one model's, under the keys of its own questions."""
    start = f"{name}\x1f"

    def own(whole: Mapping[str, _T]) -> dict[str, _T]:
        return {key.removeprefix(start): value for key, value in whole.items() if key.startswith(start)}

    return Judged(list(map(own, judged.verdicts)), list(map(own, judged.texts)), own(judged.missing), judged.usage)


def _scores(repeats: Sequence[Mapping[str, Values]], missing: Mapping[str, str]) -> ModelScores:
    metrics: dict[str, float] = {}
    values: dict[str, list[float | None]] = {}
    by_repeat: dict[str, list[float]] = {}
    for metric in repeats[0]:
        of_repeats = np.array([scores[metric] for scores in repeats])  # (R, Q)
        of_questions = of_repeats.mean(axis=0)
        if np.isnan(of_questions).all():
            continue
        values[metric] = [None if np.isnan(value) else float(value) for value in of_questions]
        by_repeat[metric] = [float(np.nanmean(of_repeat)) for of_repeat in of_repeats]
        metrics[metric] = sum(by_repeat[metric]) / len(by_repeat[metric])
    if len(repeats) > 1 and by_repeat:
        first = next(iter(by_repeat.values()))
        metrics[SPREAD] = max(first) - min(first)
    return ModelScores(metrics=metrics, values=values, repeats=by_repeat, missing=dict(missing))


def _missing(models: Mapping[str, ModelScores]) -> str:
    """A sentence about verdicts that are not there; empty where all are."""
    without = [(name, key, why) for name, scores in models.items() for key, why in scores.missing.items()]
    if not without:
        return ""
    name, key, why = without[0]
    return f"{len(without)} questions to the judge have no verdict ({key} on {name}, for one: {why})"


def _notes(
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    answers: Mapping[str, Answers],
    models: Mapping[str, ModelScores],
    judge: Judge,
    repeats: int,
    decoding: Decoding,
) -> list[str]:
    asked = f"{benchmark.title}: {len(benchmark.questions)} questions"
    asked += "" if benchmark.limit is None else ", a part of its own (not comparable with published numbers)"
    asked += f"; {benchmark.protocol}" if benchmark.protocol else ""
    asked += f"; against {benchmark.baseline}" if benchmark.baseline else ""
    if any(candidate.identity for candidate in candidates):
        temperatures = {f"{question.temperature:g}" for question in benchmark.questions}
        asked += f". Answers: temperature {' or '.join(sorted(temperatures))}, at most {decoding.max_new_tokens} tokens"
        own = benchmark.max_new_tokens
        asked += f" (the benchmark's own: {own})" if decoding.max_new_tokens != own and benchmark.protocol else ""
    asked += f". Judge: {judge.about}"
    asked += f", asked {repeats} times" if repeats > 1 else ""
    asked += ", in both orders" if benchmark.pairwise and not judge.scores_only else ""
    asked += f", {date.today()}."
    notes = [asked, *benchmark.notes]
    if elsewhere := [candidate.name for candidate in candidates if not candidate.identity]:
        notes.append(f"{benchmark.title}: the answers of {listed(elsewhere)} were made elsewhere.")
    for name, of_model in answers.items():
        cut = [answer for answer in of_model.values() if not answer.finished]
        if 100 * len(cut) >= len(of_model):
            longest = max(max(answer.token_counts, default=0) for answer in cut)
            notes.append(
                f"{benchmark.title}: {len(cut)} of {len(of_model)} answers of {name} were cut at {longest} tokens."
            )
        if shown := sum(answer.prompt_cut for answer in of_model.values()):
            notes.append(
                f"{benchmark.title}: {name} was shown only the end of {shown} questions, longer than it reads."
            )
    if sentence := _missing(models):
        notes.append(f"{benchmark.title}: {sentence}; they are left out.")
    return notes


def _used(usage: Usage) -> str:
    if not (usage.requests or usage.cached):
        return ""
    cost = f", ${usage.dollars:.2f}" if usage.dollars else ""
    return (
        f"{usage.requests:,} requests to the judge ({usage.retries:,} of them again), {usage.cached:,} verdicts out of "
        f"the cache, {usage.input_tokens:,} tokens in and {usage.output_tokens:,} out{cost}"
    )


def _read(file: Path) -> BenchmarkResults | None:
    """None where there are none, or those of another version."""
    try:
        return BenchmarkResults.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
