"""The judged benchmarks of a recipe (`report.benchmarks`): its models, and who judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from aligndistil.benchmarks import BENCHMARKS, Benchmark, Files, Pairwise, benchmark_of
from aligndistil.benchmarks.answers import Decoding
from aligndistil.benchmarks.contamination import TrainingData, find, refusal
from aligndistil.benchmarks.evaluate import (
    BenchmarkResults,
    Candidate,
    check_candidates,
    check_training_data,
    collect_answers,
    judge_answers,
)
from aligndistil.benchmarks.judges import check_judge, judge_config, open_judge
from aligndistil.benchmarks.pairwise import questions_of
from aligndistil.data import eval_prompts
from aligndistil.engine.processes import Processes
from aligndistil.errors import ServiceError, UserError
from aligndistil.evaluation.measurements import Measurements
from aligndistil.files import write_text
from aligndistil.judge import JudgeConfig
from aligndistil.models import model_hash
from aligndistil.recipe import Recipe, stage_of
from aligndistil.report import Measured
from aligndistil.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Judging:
    """What is needed to judge a recipe's models, read before anything is trained."""

    config: JudgeConfig
    benchmarks: list[Benchmark]
    """All but `pairwise`, which needs a model's answers."""
    notes: list[str]
    """On files that are not the pinned ones."""


def judge_of(recipe: Recipe) -> JudgeConfig:
    """Who judges, and that it can judge what the recipe names. Raises UserError when it cannot, or is not there."""
    report = recipe.report
    assert report.judge is not None
    stage = stage_of(report.judge)
    if stage is None:
        config = judge_config(report.judge)
    else:  # trained later, perhaps
        config = JudgeConfig(reward_model=str(RunFolder(recipe.output_dir).stage(stage).final), name=stage)
    check_judge(config, [BENCHMARKS[name] for name in report.benchmarks])
    return config


def judging_of(recipe: Recipe) -> Judging | None:
    """The judge and the benchmarks' files; None when the recipe names no benchmark.

    Raises UserError, with its place in the recipe, for a judge or a file that is not there, and for training data that
    hold a benchmark's questions; as `Files.get` does where files are to be fetched; MissingError where a package or a
    key is missing.
    """
    report = recipe.report
    if not report.benchmarks or report.judge is None:
        return None
    try:
        config = judge_of(recipe)
        if stage_of(report.judge) is None:
            open_judge(config, Processes(0, 1, torch.device("cpu")), report.batch_size)
    except UserError as error:
        raise type(error)(f"{recipe.where('report', 'judge')}: {error}") from None
    files = Files(None if report.benchmark_files is None else Path(report.benchmark_files))
    names = [name for name in report.benchmarks if name != Pairwise.name]
    try:
        benchmarks = [benchmark_of(name, files, report.benchmark_limit, config) for name in names]
    except UserError as error:
        raise type(error)(f"{recipe.where('report', 'benchmarks')}: {error}") from None
    if not report.allow_contaminated:
        # What a model has met, its teachers' data included, is in the data of some stage.
        sections = [stage.data for stage in recipe.stages.values()]
        data = TrainingData([(source, data.held_out) for data in sections for source in data.train])
        for benchmark in benchmarks:
            found = find(data, benchmark.questions, benchmark.name)
            if (why := refusal(found, benchmark.title, recipe.name)) is not None:
                raise UserError(f"{recipe.where('report', 'benchmarks')}: {why}")
    return Judging(config, benchmarks, files.notes)


def judge_models(
    measurements: Measurements, run: RunFolder, weights: Mapping[str, str], judging: Judging, processes: Processes
) -> tuple[list[BenchmarkResults], list[str], ServiceError | None]:
    """What the judge says of every language model of the comparison, and what has to stand under the table.

    Last, why a benchmark has no verdicts, where one has none; the others have theirs.

    The answers are sampled by all processes; only the first one judges, and the others are given nothing. Raises as
    `collect_answers` and `judge_answers` do.
    """
    recipe, stage = measurements.recipe, measurements.reference_stage
    report = recipe.report

    def candidate(name: str, path: str) -> Candidate:
        trained = stage_of(path)
        located = path if trained is None else str(run.stage(trained).final)
        return Candidate(name, located, stage.model, model_hash(path) if trained is None else weights[trained])

    models = {name: path for name, path in measurements.models.items() if name not in measurements.scalar}
    candidates = [candidate(name, path) for name, path in models.items()]
    benchmarks = list(judging.benchmarks)
    folder = run.report / "benchmarks"

    def decoding(benchmark: Benchmark) -> Decoding:
        own = report.max_new_tokens or stage.data.max_response_length
        longest = own if benchmark.name == Pairwise.name else benchmark.max_new_tokens
        return Decoding(longest, report.seed, report.batch_size)

    if report.against is not None:
        questions = questions_of(eval_prompts(stage.data), report.samples, 1.0)
        name = next((name for name, path in models.items() if path == report.against), report.against)
        asked = Pairwise(questions, {}, name)
        other = candidate(name, report.against)
        against = collect_answers(asked, [other], folder / asked.name, decoding(asked), processes)
        benchmarks.append(Pairwise(questions, against[name], name))
    # The questions of `pairwise` are held out from training by the recipe itself.
    notes = [
        *judging.notes,
        *check_training_data(candidates, judging.benchmarks, allowed=report.allow_contaminated),
    ]
    check_candidates(candidates, benchmarks)
    answers = [
        collect_answers(benchmark, candidates, folder / benchmark.name, decoding(benchmark), processes)
        for benchmark in benchmarks
    ]
    if not processes.is_main:
        return [], [], None
    judge = open_judge(judging.config, processes, report.batch_size)
    results: list[BenchmarkResults] = []
    failed: ServiceError | None = None
    for benchmark, of_models in zip(benchmarks, answers, strict=True):
        place, how = folder / benchmark.name, decoding(benchmark)
        try:
            results.append(
                judge_answers(
                    benchmark,
                    candidates,
                    of_models,
                    judge,
                    report.judge_repeats,
                    place,
                    how,
                    allow_missing=report.allow_missing,
                )
            )
        except ServiceError as error:  # what the others gave is kept
            failed = error
            notes.append(f"{benchmark.title} is not judged yet: {error}.")
    for name in models:
        metrics = {metric: value for result in results for metric, value in result.metrics(name).items()}
        values = {metric: value for result in results for metric, value in result.values(name).items()}
        judged = Measured(key="", metrics=metrics, values=values, pairs={})
        write_text(run.report / "models" / f"{name}.judged.json", judged.model_dump_json() + "\n")
    return results, notes, failed
