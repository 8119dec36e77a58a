"""The tables and pictures at the end of a recipe: every model measured on the same prompts and pairs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from aligndistil.benchmarks.evaluate import BenchmarkResults
from aligndistil.commands.judging import Judging, judge_models
from aligndistil.data import sources_of
from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel, Scorer
from aligndistil.errors import UserError
from aligndistil.evaluation.measurements import INITIAL, EvalSet, Measurements, measurements_of, read_eval_set, sha256
from aligndistil.evaluation.model import EvalResult, Evaluator
from aligndistil.evaluation.rewards import contrastive_rewards, own_reward, text_reader
from aligndistil.files import write_text
from aligndistil.models import load_model, load_scalar_model, model_hash, pick_dtype
from aligndistil.progress import Steps
from aligndistil.recipe import Recipe, stage_of
from aligndistil.report import (
    ComparedWith,
    Comparison,
    Measured,
    ModelResult,
    RewardResult,
    combine,
    read_measured,
    read_runs,
    save_results,
    step_seconds,
    summary,
    training_metrics,
    write_report,
)
from aligndistil.rollout import SamplingParams
from aligndistil.run_folder import RunFolder, add_comparison
from aligndistil.training import TextReward, gold_reward_of

EVALUATION_VERSION = "6"
"""Raised when the same models get other numbers than before."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WrittenComparison:
    """What was compared, and where it was written."""

    table: Comparison
    files: list[Path]


def locate(run: RunFolder, path: str) -> str:
    """A model path of a recipe to what can be loaded: `stage:NAME` is that stage's final model."""
    name = stage_of(path)
    return path if name is None else str(run.stage(name).final)


def compare_models(
    recipe: Recipe, run: RunFolder, processes: Processes, weights: Mapping[str, str], judging: Judging | None
) -> WrittenComparison | None:
    """Measure what has not been measured yet and write `report/`. Collective.

    `weights` are the hashes of the stages' final models. None when no stage has eval data, and on all processes but the
    first. Raises UserError when something cannot be judged, after it has written everything else.
    """
    measurements = measurements_of(recipe)
    if measurements is None:
        return None
    eval_set = read_eval_set(measurements, lambda path: locate(run, path))
    measured_on, keys = _keys(measurements, eval_set, weights)
    waiting = {name: key for name, key in keys.items() if _read(run, name, key) is None}
    waiting = processes.gather(waiting)[0]  # the first process decides: others may see the disk later
    if waiting:
        _measure(measurements, eval_set, run, waiting, processes)
    processes.barrier()
    failed: UserError | None = None
    judged: list[BenchmarkResults] = []
    notes: list[str] = []
    if judging is not None:
        try:
            judged, notes, failed = judge_models(measurements, run, weights, judging, processes)
        except UserError as error:
            failed, notes = error, [f"Not judged yet: {error}."]
    if not processes.is_main:
        return None
    results = {name: _read(run, name, key) or EvalResult({}) for name, key in keys.items()}
    for of_benchmark in judged:
        for name in of_benchmark.models:
            metrics = results[name].metrics | of_benchmark.metrics(name)
            results[name] = replace(results[name], metrics=metrics)
    table = _table(measurements, run, results, eval_set, measured_on)
    said = [note for result in judged for note in result.notes] + notes
    against = None if recipe.report.against is None else _row_or_path(measurements, recipe.report.against)
    update = {"weights": dict(weights), "judged": said, "against": ComparedWith(name=against) if against else None}
    table = table.model_copy(update=update)
    save_results(run.report / "comparison.json", table)
    # From here on it is one of the runs that may be put together.
    combined, logs = combine(read_runs([run.path]))
    for name in recipe.stages:
        add_comparison(run.stage(name).final, summary(combined))
    written = WrittenComparison(combined, write_report(run.report, combined, logs))
    if failed is not None:  # what was measured without the judge is written before that is said
        raise failed
    return written


def _keys(measurements: Measurements, eval_set: EvalSet, weights: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Hashes of everything that numbers depend on: what all rows have in common, and by row, all of it."""

    def identity(path: str) -> str:
        name = stage_of(path)
        return model_hash(path) if name is None else weights[name]

    data, model = measurements.reference_stage.data, measurements.reference_stage.model
    settings = {"samples", "pairs", "batch_size", "max_new_tokens", "seed"}
    shared = sha256(
        EVALUATION_VERSION,
        identity(measurements.initial),
        measurements.recipe.report.model_dump(mode="json", include=settings),
        eval_set.content_hash(),
        [source.path for source in sources_of(data, "eval")],  # some have an exact reward
        data.max_response_length,
        model.model_dump(mode="json", exclude={"path"}),
        str(pick_dtype(model.dtype)),
    )
    against = identity(measurements.kl_to), "" if measurements.reward is None else identity(measurements.reward)
    return shared, {
        name: sha256(shared, identity(path), *against, eval_set.pairs_hash(name))
        for name, path in (measurements.models | measurements.references).items()
    }


def _measure(
    measurements: Measurements, eval_set: EvalSet, run: RunFolder, waiting: Mapping[str, str], processes: Processes
) -> None:
    """Measure the rows of `waiting`, and write each with its key as soon as it is measured."""
    recipe, stage = measurements.recipe, measurements.reference_stage
    settings = recipe.report

    def load(path: str) -> PreTrainedModel:
        return load_model(locate(run, path), stage.model, trained=False)

    def load_scalar(path: str) -> ScalarModel:
        name = stage_of(path)
        section = stage.model if name is None else recipe.stages[name].model
        model = load_scalar_model(locate(run, path), section, trained=False)
        return ScalarModel(on_device(model, processes.device))

    def load_reward(path: str) -> Scorer | None:
        try:
            reader = text_reader(measurements, eval_set, lambda path: locate(run, path))
        except UserError as error:
            logger.warning("nothing is scored: %s", error)
            return None
        scores = load_scalar(path)
        return scores if reader is None else TextReward(scores, reader, eval_set.tokenizer)

    with Steps("comparing models", len(waiting), unit="models", rank=processes.rank) as steps:
        reward_model = None if measurements.reward is None else load_reward(measurements.reward)
        evaluator = Evaluator(
            eval_set,
            SamplingParams(settings.max_new_tokens or stage.data.max_response_length),
            batch_size=settings.batch_size,
            seed=settings.seed,
            processes=processes,
            gold_reward=gold_reward_of(stage.data),
            reward_model=reward_model,
        )
        # What all models are compared with stays loaded.
        always = (
            (measurements.initial, measurements.kl_to)
            if waiting.keys() & measurements.models.keys() - measurements.scalar
            else ()
        )
        kept = {path: load(path) for path in dict.fromkeys(always)}
        for name, key in waiting.items():
            path = (measurements.models | measurements.references)[name]
            if name in measurements.references:
                result = evaluator.measure_pairs(load(path))
            elif name in measurements.scalar:
                result = evaluator.measure_scores(load_scalar(path), name)
            else:
                initial, kl_to = kept[measurements.initial], kept[measurements.kl_to]
                result = evaluator.measure(kept.get(path) or load(path), initial=initial, kl_to=kl_to)
            if processes.is_main:
                _write(run, name, key, result)
            steps.advance(values={"last": name})


def _table(
    measurements: Measurements, run: RunFolder, results: Mapping[str, EvalResult], eval_set: EvalSet, measured_on: str
) -> Comparison:
    """From what was measured of the models, and what their training logged."""
    recipe = measurements.recipe
    settings, stages, labels = recipe.report, recipe.stages, row_labels(recipe)
    pairs = {name: result.pairs for name, result in results.items()}
    logged = {name: run.stage(name).metrics.read() for name in stages}
    seconds = {name: list(step_seconds(lines).values())[-1:] for name, lines in logged.items()}
    own = {name: reward for name in stages if (reward := own_reward(measurements, name)) is not None}
    splits = [split for split in pairs[INITIAL] if split == "eval" or settings.reward_accuracy]
    if not splits:
        own = {}
    rewards = [
        RewardResult(
            name=reward.name,
            kind=reward.kind,
            of=name,
            right={split: [reward.right(pairs, eval_set.lengths, split)] for split in splits},
            measured_on=measured_on,
        )
        for name, reward in [*own.items(), *(("", reward) for reward in contrastive_rewards(measurements) if splits)]
    ]
    rows = [ModelResult(name=INITIAL, objective="", method=INITIAL, metrics=results[INITIAL].metrics)]
    for name, stage in stages.items():
        metrics = results[name].metrics | training_metrics(run.stage(name).read_done(), logged[name])
        shares = next((reward.shares("eval") for reward in rewards if reward.of == name), [])
        if shares:
            metrics["rewards/accuracies"] = sum(shares[0]) / len(shares[0])
        needed = [name, *_ancestors(recipe, name)]
        if all(seconds[one] for one in needed):
            metrics["compute_seconds"] = sum(seconds[one][0] for one in needed)
        method, setting = labels[name]
        row = ModelResult(name=name, objective=stage.objective.name, method=method, setting=setting, metrics=metrics)
        rows.append(row)
    return Comparison(
        results=rows,
        kl_to=ComparedWith(name=_row_or_path(measurements, measurements.kl_to)),
        reward=ComparedWith(name=_row_or_path(measurements, measurements.reward)) if measurements.reward else None,
        rewards=rewards,
        show_rewards=settings.reward_accuracy,
        columns=None if settings.columns is None else list(settings.columns),
        measured_on=measured_on,
        threshold_metric=settings.threshold_metric,
        threshold_value=settings.threshold,
    )


def _row_or_path(measurements: Measurements, path: str) -> str:
    return next((name for name, other in measurements.models.items() if other == path), path)


def _ancestors(recipe: Recipe, name: str) -> list[str]:
    """The stages that a stage needs, and those that they need."""
    found: dict[str, None] = {}
    for other in recipe.stages[name].inputs:
        found |= dict.fromkeys([other, *_ancestors(recipe, other)])
    return list(found)


def row_labels(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """By stage, the method and setting that tables and pictures call it by: as the recipe says, or else its objective.

    Where that is not enough to tell two stages apart, the stage's name is the setting.
    """
    stages, rows = recipe.stages, recipe.report.rows
    policies = {(stage.objective.method, stage.on_policy) for stage in stages.values()}
    labels = {}
    for name, stage in stages.items():
        method, both = stage.objective.method, {(stage.objective.method, on) for on in (True, False)} <= policies
        method += (" on-policy" if stage.on_policy else " off-policy") if both else ""
        labels[name] = (f"reverse {method}" if stage.data.reverse_preferences else method, "")
        if name in rows:
            labels[name] = (rows[name].method, rows[name].setting or "")
    often = Counter(labels.values())
    labels = {name: label if often[label] == 1 else (label[0], name) for name, label in labels.items()}
    often = Counter(labels.values())
    return {name: label if often[label] == 1 else (f"{label[0]} {name}", label[1]) for name, label in labels.items()}


def _read(run: RunFolder, name: str, key: str) -> EvalResult | None:
    """What was measured with this key; None where nothing was, or another model, or on another eval set."""
    measured = read_measured(run.report / "models" / f"{name}.json")
    return (
        None
        if measured is None or measured.key != key
        else EvalResult(measured.metrics, measured.values, measured.pairs)
    )


def _write(run: RunFolder, name: str, key: str, result: EvalResult) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.samples)
    write_text(run.report / "samples" / f"{name}.jsonl", lines)
    pairs = {split: [list(pair) for pair in of_split] for split, of_split in result.pairs.items()}
    measured = Measured(key=key, metrics=result.metrics, values=result.values, pairs=pairs)
    write_text(run.report / "models" / f"{name}.json", measured.model_dump_json() + "\n")
