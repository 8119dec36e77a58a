"""`aligndistil evaluate`: models on judged benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import rich
from filelock import FileLock, Timeout

from aligndistil.benchmarks import BENCHMARKS, Benchmark, Files, Pairwise, benchmark_of
from aligndistil.benchmarks.answers import Decoding
from aligndistil.benchmarks.evaluate import (
    BenchmarkResults,
    Candidate,
    check_candidates,
    check_training_data,
    collect_answers,
    file_name,
    judge_answers,
)
from aligndistil.benchmarks.judges import check_judge, judge_config, open_judge
from aligndistil.benchmarks.pairwise import questions_of
from aligndistil.commands.compare import show
from aligndistil.commands.rank import judge_beside_people, rank_rewards
from aligndistil.data import Record, eval_prompts, read_prompts
from aligndistil.engine.processes import Processes, launched_world, process_group, start_processes
from aligndistil.errors import UserError, for_console, guess_and_list
from aligndistil.models import model_exists, model_hash
from aligndistil.recipe import Data, Model, Source
from aligndistil.report import ComparedWith, Comparison, ModelResult, with_statistics, write_report
from aligndistil.run_folder import StageFolder, check_as_trained, section_of
from aligndistil.run_folder.outputs import check_folder
from aligndistil.token_view.trained import stage_folder

REWARD_BENCH, HUMAN_AGREEMENT = "reward_bench_2", "human_agreement"
OF_A_RUN = ("environment.json", "done.json")
RANKING = (REWARD_BENCH, HUMAN_AGREEMENT)
"""What is about rewards and judges instead of answers."""
READ_BY = {
    REWARD_BENCH: {"benchmarks", "out", "limit", "data_dir", "batch_size", "allow_contaminated"},
    HUMAN_AGREEMENT: {"benchmarks", "judge", "out", "repeats", "data_dir", "batch_size", "allow_missing"},
}
"""The options that they read."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the models."""

    benchmarks: Sequence[str] = ()
    judge: str | None = None
    out: Path = Path("evaluation")
    repeats: int = 2
    limit: int | None = None
    data_dir: Path | None = None
    against: str | None = None
    prompts: str | None = None
    temperature: float = 1.0
    """Of the answers to `prompts`; a benchmark has its own."""
    max_new_tokens: int | None = None
    """None is the benchmark's own."""
    batch_size: int = 16
    seed: int = 0
    answers: Sequence[str] = ()
    """Files of answers that were made elsewhere."""
    answers_only: bool = False
    allow_contaminated: bool = False
    allow_missing: bool = False


def evaluate(given: Sequence[str], options: Options) -> None:
    """Answer, judge and print.

    Raises UserError for what cannot be evaluated, as far as it can be known before anything is sampled.
    """
    names = list(dict.fromkeys([*options.benchmarks, *([Pairwise.name] if options.against else [])]))
    if alone := [name for name in names if name in RANKING]:
        if len(names) > 1:
            raise UserError(f"--benchmark {alone[0]} has a table of its own: run it in a command of its own")
        table = _ranking(alone[0], given, options)
        show(table, options.out, write_report(options.out, table, {}))
        return
    known = [*BENCHMARKS, *RANKING]
    for name in names:
        if name not in BENCHMARKS:
            hint = guess_and_list(name, known, "benchmarks")
            raise UserError(f"--benchmark {name}: there is no such benchmark{hint}")
    if not names:
        raise UserError(f"say what to evaluate on: --benchmark {', '.join(known)}; or --against ANOTHER_MODEL")
    if Pairwise.name in names and options.against is None:
        raise UserError("--benchmark pairwise: say whose answers they are compared with: --against MODEL_OR_ANSWERS")
    if options.against is None and (options.prompts is not None or options.temperature != Options().temperature):
        raise UserError(
            "--prompts and --temperature are of --against: name the model that the answers are compared with"
        )
    if options.answers_only == (options.judge is not None):
        raise UserError("say who judges (--judge JUDGE.yaml), or give --answers-only to write the answers alone")
    check_folder(options.out)
    candidates = find_candidates(given, options.answers)
    other = None if options.against is None else _find(options.against)
    files = Files(options.data_dir)
    config = None if options.judge is None else judge_config(options.judge)
    benchmarks = [benchmark_of(name, files, options.limit, config) for name in names if name != Pairwise.name]
    _refuse_same_names([*candidates, *([other] if other else [])], benchmarks)
    if config is not None:
        check_judge(config, [BENCHMARKS[name] for name in names])
    with ExitStack() as stack:
        with process_group() as processes:
            judge = None if config is None else open_judge(config, processes, options.batch_size)
            stack.enter_context(_alone(options.out, processes))
            if other is not None:
                benchmarks.append(_against(other, candidates, options, processes))
            notes = [*files.notes, *check_training_data(candidates, benchmarks, allowed=options.allow_contaminated)]
            check_candidates(candidates, benchmarks)
            answers = [
                collect_answers(
                    benchmark, candidates, options.out / benchmark.name, _decoding(benchmark, options), processes
                )
                for benchmark in benchmarks
            ]
        if not processes.is_main:
            return
        console = rich.get_console()
        if judge is None:
            for benchmark in benchmarks:
                console.print(for_console(f"answers  {options.out / benchmark.name}/"), soft_wrap=True)
            return
        results = [
            judge_answers(
                benchmark,
                candidates,
                of_models,
                judge,
                options.repeats,
                options.out / benchmark.name,
                _decoding(benchmark, options),
                allow_missing=options.allow_missing,
            )
            for benchmark, of_models in zip(benchmarks, answers, strict=True)
        ]
        table = results_table([candidate.name for candidate in candidates], results, notes, other)
        show(table, options.out, write_report(options.out, table, {}))
        for result in results:
            if result.usage:
                console.print(for_console(f"judging {result.benchmark}: {result.usage}"), soft_wrap=True)


@contextmanager
def _alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep other evaluations out of the folder: they would write over each other's tables.

    Raises UserError when another process works in it. What ends here by Ctrl-C says how to go on.
    """
    if not processes.is_main:
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out: another process is working in {folder}; wait for it, or give another folder") from None
    try:
        yield
    except KeyboardInterrupt:
        rich.print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    finally:
        lock.release()


def _refuse_same_names(candidates: Sequence[Candidate], benchmarks: Sequence[Benchmark]) -> None:
    """Files are called after the models: two of one name would be written over each other."""
    taken = {benchmark.baseline: benchmark.title for benchmark in benchmarks if benchmark.baseline}
    for i, candidate in enumerate(candidates):
        name = file_name(candidate.name)
        if name in taken:
            raise UserError(
                f"{candidate.path} would be called {name}, as the baseline of {taken[name]}: name it, as in OTHER=PATH"
            )
        for before in candidates[:i]:
            same = before.name == candidate.name and before.identity and before.identity == candidate.identity
            if file_name(before.name) == name and not same:
                raise UserError(
                    f"{before.path} and {candidate.path} would both be called {name}: give one another name, as in "
                    "OTHER=PATH"
                )


def _ranking(name: str, given: Sequence[str], options: Options) -> Comparison:
    unread = [key for key in Options.__slots__ if key not in READ_BY[name]]
    if ignored := [key for key in unread if getattr(options, key) != getattr(Options(), key)]:
        given_as = ignored[0].replace("repeats", "repeat").replace("_", "-")
        raise UserError(f"--benchmark {name} does not read --{given_as}: leave it out")
    if launched_world() > 1:
        raise UserError(f"--benchmark {name} is one process's work: leave --processes out")
    check_folder(options.out)
    files, alone = Files(options.data_dir), start_processes()
    with _alone(options.out, alone):
        if name == REWARD_BENCH:
            return rank_rewards(
                given,
                files,
                options.limit,
                options.out,
                alone,
                options.batch_size,
                allow_contaminated=options.allow_contaminated,
            )
        if given or options.judge is None:
            raise UserError(f"--benchmark {name} is of a judge: give --judge, and no model")
        config = judge_config(options.judge)
        return judge_beside_people(
            config, files, options.repeats, alone, options.batch_size, allow_missing=options.allow_missing
        )


def results_table(
    names: Sequence[str], results: Sequence[BenchmarkResults], notes: Sequence[str], against: Candidate | None
) -> Comparison:
    """A row for each model, with everything that was judged of it."""
    rows = []
    for name in names:
        metrics: dict[str, float] = {}
        values: dict[str, list[list[float]]] = {}
        for result in results:
            metrics |= result.metrics(name)
            values |= {metric: [of_questions] for metric, of_questions in result.values(name).items()}
        rows.append(
            ModelResult(name=name, objective="", metrics=metrics, values=values, measured_on="the same questions")
        )
    said = [note for result in results for note in result.notes]
    baseline = None if against is None else ComparedWith(name=against.name)
    return with_statistics(Comparison(results=rows, against=baseline, judged=[*said, *notes]))


def find_candidates(models: Sequence[str], answers: Sequence[str]) -> list[Candidate]:
    """Runs, stages, model folders and Hub ids; then files of answers. `LABEL=` in front of one is its name.

    Raises UserError for what is none of these, and for two of the same name.
    """
    found = [_candidate(*_labelled(text)) for text in models]
    for text in answers:
        label, path = _labelled(text)
        if not Path(path).is_file():
            raise UserError(f"--answers {path}: there is no such file")
        found.append(_elsewhere(label, path))
    if not found:
        raise UserError("give a model to evaluate: a run, a stage, a model folder or a Hub id; or --answers FILE")
    if twice := [one.name for one in found if [other.name for other in found].count(one.name) > 1]:
        raise UserError(f"two models would be called {twice[0]}: give one of them another name, as in OTHER=PATH")
    return found


def _labelled(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    return (label, path) if equals and not Path(text).exists() else ("", text)


def _find(text: str) -> Candidate:
    """What `--against` names: a model, or a file of answers."""
    label, path = _labelled(text)
    return _elsewhere(label, path) if Path(path).is_file() else _candidate(label, path)


def _elsewhere(label: str, path: str) -> Candidate:
    return Candidate(label or Path(path).stem, path, Model(path=path))


def _candidate(label: str, path: str) -> Candidate:
    folder = Path(path)
    if any(folder.glob("seed-*/environment.json")) or any((folder / name).is_file() for name in OF_A_RUN):
        folder = stage_folder(folder).resolve()
        stage = StageFolder(folder)
        done = stage.read_done()
        if done is None or not stage.final.is_dir():
            raise UserError(f"{folder}: the stage is not finished: run `aligndistil train` on its recipe again")
        name, path = label or f"{folder.parent.name}/{folder.name}", str(stage.final)
        check_as_trained(path, model_hash)
        return Candidate(name, path, section_of(path), model_hash(path))
    model_exists(path)
    check_as_trained(path, model_hash)
    name = label or (folder.resolve().name if folder.is_dir() else path)
    return Candidate(name, path, section_of(path), model_hash(path))


def _against(other: Candidate, candidates: Sequence[Candidate], options: Options, processes: Processes) -> Benchmark:
    """Own prompts, and what the other model answers to them."""
    questions = questions_of(_prompts(options.prompts, candidates), options.limit, options.temperature)
    asked = Pairwise(questions, {}, other.name)
    folder = options.out / Pairwise.name
    of_other = collect_answers(asked, [other], folder, _decoding(asked, options), processes)
    return Pairwise(questions, of_other[other.name], other.name)


def _prompts(prompts: str | None, candidates: Sequence[Candidate]) -> Iterable[Record]:
    """`PATH` or `PATH#SPLIT`; without it, the eval data of the first model that was trained here."""
    if prompts is not None:
        path, _, split = prompts.partition("#")
        return read_prompts(Source(path=path, split=split or "train"))
    for candidate in candidates:
        done = StageFolder(Path(candidate.path).parent).read_done() if candidate.identity else None
        if done is not None and (data := Data.model_validate(done.resolved["data"])).eval:
            return eval_prompts(data)
    raise UserError("say what the models are asked: --prompts FILE (or FILE#SPLIT), with a column `prompt`")


def _decoding(benchmark: Benchmark, options: Options) -> Decoding:
    return Decoding(options.max_new_tokens or benchmark.max_new_tokens, options.seed, options.batch_size)
