"""The tables and the picture at the end of a recipe: every model measured on the same prompts and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.evaluation.measurements import INITIAL, EvalSet, Measurements, measurements_of, read_eval_set, sha256
from aligndistil.evaluation.model import EvalResult, Evaluator
from aligndistil.evaluation.rewards import Reward, rewards_of
from aligndistil.files import write_text
from aligndistil.models import load_model, load_scalar_model, load_tokenizer, model_hash, pick_dtype
from aligndistil.progress import Steps
from aligndistil.recipe import Recipe, stage_of
from aligndistil.report import (
    Comparison,
    ModelResult,
    RewardResult,
    read_logs,
    training_metrics,
    with_steps_to_reward,
    write_report,
)
from aligndistil.rollout import SamplingParams
from aligndistil.run_folder import RunFolder
from aligndistil.training import gold_reward_of

EVALUATION_VERSION = "3"
"""Raised when the same models get other numbers than before."""


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
    recipe: Recipe, run: RunFolder, processes: Processes, weights: Mapping[str, str]
) -> WrittenComparison | None:
    """Measure what has not been measured yet and write `report/`. None when no stage has eval data. Collective.

    `weights` are the hashes of the stages' final models.
    """
    measurements = measurements_of(recipe)
    if measurements is None:
        return None
    eval_set = read_eval_set(measurements, lambda path: locate(run, path))
    measured_on, keys = _keys(measurements, eval_set, weights)
    waiting = {name: key for name, key in keys.items() if _read(run, name, key) is None}
    processes.barrier()
    if waiting:
        _measure(measurements, eval_set, run, waiting, processes)
    processes.barrier()
    results = {name: _read(run, name, key) or EvalResult({}) for name, key in keys.items()}
    logged = {name: run.stage(name).metrics.read() for name in recipe.stages}
    table = _table(measurements, run, results, logged, measured_on).model_copy(update={"weights": dict(weights)})
    return WrittenComparison(table, write_report(run.report, table, logged) if processes.is_main else [])


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
        [source.path for source in data.eval or []],  # some have an exact reward
        data.max_response_length,
        model.model_dump(mode="json", exclude={"path"}),
        str(pick_dtype(model.dtype)),
    )
    against = identity(measurements.kl_to), "" if measurements.reward is None else identity(measurements.reward)
    return shared, {
        name: sha256(shared, identity(path), *against, eval_set.pairs_hash(name))
        for name, path in measurements.models.items()
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

    with Steps("comparing models", len(waiting), unit="models", rank=processes.rank) as steps:
        reward_model = None
        if measurements.reward is not None:
            vocab = load_tokenizer(locate(run, measurements.reward), stage.model).get_vocab()
            # A reward model that reads other tokens than the policies write scores no samples.
            if vocab == eval_set.tokenizer.get_vocab():
                reward_model = load_scalar(measurements.reward)
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
        always = (measurements.initial, measurements.kl_to) if waiting.keys() - measurements.scalar else ()
        kept = {path: load(path) for path in dict.fromkeys(always)}
        for name, key in waiting.items():
            path = measurements.models[name]
            if name in measurements.scalar:
                result = evaluator.measure_scores(load_scalar(path), name)
            else:
                initial, kl_to = kept[measurements.initial], kept[measurements.kl_to]
                result = evaluator.measure(kept.get(path) or load(path), initial=initial, kl_to=kl_to)
            if processes.is_main:
                _write(run, name, key, result)
            steps.advance(values={"last": name})


def _table(
    measurements: Measurements,
    run: RunFolder,
    results: Mapping[str, EvalResult],
    logged: Mapping[str, list[dict[str, Any]]],
    measured_on: str,
) -> Comparison:
    """From what was measured of the models, and what their training logged."""
    settings, stages = measurements.recipe.report, measurements.recipe.stages
    pairs = {name: result.pairs for name, result in results.items()}
    rows = [ModelResult(name=INITIAL, objective="", metrics=results[INITIAL].metrics)]
    for name, stage in stages.items():
        metrics = results[name].metrics
        if pairs[name].get("eval"):
            scalar = name in measurements.scalar
            right = (Reward("score", name, None) if scalar else Reward("implicit", name, INITIAL)).right(pairs, "eval")
            metrics = {"reward_accuracy": right.count("1") / len(right), **metrics}
        metrics = metrics | training_metrics(run.stage(name).read_done(), logged[name])
        rows.append(ModelResult(name=name, objective=stage.objective.name, metrics=metrics))
    splits = list(pairs[INITIAL]) if settings.reward_accuracy else []
    rewards = [
        RewardResult(
            name=reward.name,
            kind=reward.kind,
            right={split: [reward.right(pairs, split)] for split in splits},
            measured_on=measured_on,
        )
        for reward in (rewards_of(measurements) if splits else [])
    ]
    table = Comparison(
        kl_to=stage_of(measurements.kl_to) or measurements.kl_to,
        results=rows,
        reward=(stage_of(measurements.reward) or measurements.reward) if measurements.reward else "",
        rewards=rewards,
        columns=None if settings.columns is None else list(settings.columns),
        measured_on=measured_on,
    )
    paths = {name: run.stage(name).metrics.path for name in stages}
    logs = {name: {"": read_logs(path)[0]} for name, path in paths.items() if path.is_file()}
    return with_steps_to_reward(table, logs, settings.threshold_metric, settings.threshold)


def _read(run: RunFolder, name: str, key: str) -> EvalResult | None:
    """What was measured with this key; None where nothing was, or another model, or on another eval set."""
    path = run.report / "models" / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    return EvalResult(record["metrics"], record["pairs"]) if record and record["key"] == key else None


def _write(run: RunFolder, name: str, key: str, result: EvalResult) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.samples)
    write_text(run.report / "samples" / f"{name}.jsonl", lines)
    record = {"key": key, "metrics": result.metrics, "pairs": result.pairs}
    write_text(run.report / "models" / f"{name}.json", json.dumps(record) + "\n")
