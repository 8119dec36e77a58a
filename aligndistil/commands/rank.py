"""`aligndistil evaluate` of what ranks answers: rewards on RewardBench 2, and a judge beside people (Table 4)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from aligndistil.benchmarks.evaluate import Candidate, check_training_data, file_name
from aligndistil.benchmarks.files import Files
from aligndistil.benchmarks.human_agreement import Agreement, HumanAgreement, published
from aligndistil.benchmarks.judges import open_judge
from aligndistil.benchmarks.rankers import rankers_of
from aligndistil.benchmarks.reward_bench import RewardBench2
from aligndistil.engine.processes import Processes
from aligndistil.errors import ServiceError, UserError
from aligndistil.files import write_text
from aligndistil.judge import JudgeConfig, Price
from aligndistil.progress import Steps
from aligndistil.recipe import Model
from aligndistil.report import Comparison, ModelResult, with_statistics

MAX_LENGTH = 2048
"""Tokens of a response that a reward reads."""
PAPER = ("alpaca_eval_gpt4", "alpaca_eval_gpt4_turbo_fn", "weighted_alpaca_eval_gpt4_turbo", "humans")
"""The rows of the paper's Table 4 that AlpacaEval itself published."""


def rank_rewards(
    given: Sequence[str],
    files: Files,
    limit: int | None,
    out: Path,
    processes: Processes,
    batch_size: int,
    *,
    allow_contaminated: bool,
) -> Comparison:
    """RewardBench 2 of every reward that the runs, stages and reward models stand for.

    Raises UserError as `rankers_of` and `Ranker.rank` do, and for a model that was trained on the prompts.
    """
    benchmark = RewardBench2(files, limit)
    rankers = [ranker for path in given for ranker in rankers_of(path, Model(path=path))]
    if not rankers:
        raise UserError("give what ranks responses: a run, a stage, or a reward model")
    rows, notes = [], [*files.notes, *benchmark.notes]
    paths = dict.fromkeys(path for one in rankers for path in (one.model, one.against) if path is not None)
    models = [Candidate(path, path, Model(path=path)) for path in paths]
    notes += check_training_data(models, [benchmark], allowed=allow_contaminated)
    for ranker in rankers:
        total = sum(len(row.responses) for row in benchmark.rows) * (1 if ranker.against is None else 2)
        with Steps(f"reward_bench_2: {ranker.name}", total, unit="responses") as steps:
            ranked = ranker.rank(
                benchmark.rows, processes, batch_size=batch_size, max_length=MAX_LENGTH, on_progress=steps.advance
            )
        notes += ranked.notes
        values = {f"reward_bench_2/{k}": v[~np.isnan(v)].tolist() for k, v in benchmark.scores(ranked.scores).items()}
        metrics = {name: float(np.mean(of_rows)) for name, of_rows in values.items()}
        samples = {name: [of_rows] for name, of_rows in values.items()}
        rows.append(
            ModelResult(name=ranker.name, objective="", metrics=metrics, values=samples, measured_on="reward_bench_2")
        )
        lines = zip(benchmark.rows, ranked.scores, strict=True)
        text = "".join(json.dumps({"id": row.id, "subset": row.subset, "scores": of}) + "\n" for row, of in lines)
        write_text(out / "reward_bench_2" / f"{file_name(ranker.name)}.jsonl", text)
    said = f"RewardBench 2: {len(benchmark.rows)} prompts, {date.today()}; the mean of its six subsets."
    return with_statistics(Comparison(results=rows, judged=[said, *notes]))


def judge_beside_people(
    config: JudgeConfig, files: Files, repeats: int, processes: Processes, batch_size: int, *, allow_missing: bool
) -> Comparison:
    """The paper's Table 4: a judge's agreement with AlpacaEval's human annotations, beside rows that were published.

    Raises UserError when this judge cannot be asked, ServiceError when verdicts are missing and that is not allowed.
    """
    people, judge = HumanAgreement(files, config.alpaca_eval), open_judge(config, processes, batch_size)
    asks, repeats = people.asks(), 1 if judge.scores_only else repeats
    with Steps("human_agreement: judging", len(asks) * repeats, unit="verdicts") as steps:
        judged = judge.ask(asks, repeats, "human_agreement", lambda done, usage: steps.advance(done - steps.done))
    notes = [
        f"AlpacaEval's human annotations: {len(asks) // 2} pairs with four verdicts each, {date.today()}. Judge: "
        f"{judge.about}, asked {repeats} times, in both orders ({config.alpaca_eval}). Rows called published are those "
        "of AlpacaEval's own table of evaluators.",
        *files.notes,
    ]
    if judged.missing:
        key, why = next(iter(judged.missing.items()))
        sentence = f"{len(judged.missing)} of {len(asks)} questions to the judge have no verdict ({key}: {why})"
        if not allow_missing:
            raise ServiceError(
                f"human_agreement: {sentence}; the same command asks for them again, and --allow-missing makes a table "
                "without them that says so"
            )
        notes.append(f"{sentence}; they are left out.")
    found = [people.scores(verdicts) for verdicts in judged.verdicts]
    own = {}
    if config.price != Price():
        paid = judged.usage.dollars + judged.usage.saved
        own["human_agreement/price"] = 1000 * paid / (len(asks) // 2 * repeats)
    if repeats > 1:
        spread = [one.agreement for one in found]
        own["human_agreement/repeat_spread"] = max(spread) - min(spread)
    rows = [_row(judge.name, found, own), _row("humans", [people.humans()], {})]
    rows += [_row(f"{name} (published)", [published()[name]], {}) for name in PAPER]
    return Comparison(results=rows, judged=notes)


def _row(name: str, repeats: Sequence[Agreement], more: dict[str, float]) -> ModelResult:
    """Means over the repeats."""
    agreement, error, spearman, pearson, _ = np.mean(repeats, axis=0).tolist()
    metrics = {"agreement": agreement, "spearman": spearman, "pearson": pearson}
    errors = {} if math.isnan(error) else {"human_agreement/agreement": error}
    metrics = {f"human_agreement/{metric}": value for metric, value in metrics.items()} | more
    return ModelResult(name=name, objective="", metrics=metrics, errors=errors)
