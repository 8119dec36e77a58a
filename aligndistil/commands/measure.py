"""The tables and the picture at the end of a recipe: every model measured on the same prompts and pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from aligndistil.engine.policy import on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel, Scorer
from aligndistil.evaluation import (
    INITIAL,
    Bench,
    Evaluator,
    Measured,
    ModelToEvaluate,
    Plan,
    Reward,
    bench_of,
    evaluator_of,
    plan_of,
    rewards_of,
)
from aligndistil.files import write_text
from aligndistil.models import load_model, load_scalar_model, load_tokenizer, model_hash, pick_dtype
from aligndistil.progress import Steps
from aligndistil.recipe import Recipe, stage_of
from aligndistil.report import Comparison as Table
from aligndistil.report import (
    ModelResult,
    RewardResult,
    read_logs,
    training_metrics,
    with_steps_to_reward,
    write_report,
)
from aligndistil.run_folder import RunFolder

EVALUATION_VERSION = "3"
"""Raised when the same models get other numbers than before."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was compared, and where it was written."""

    table: Table
    files: list[Path]


def locate(run: RunFolder, path: str) -> str:
    """A model path of a recipe to what can be loaded: `stage:NAME` is that stage's final model."""
    name = stage_of(path)
    return path if name is None else str(run.stage(name).final)


def text_of_file(named: object) -> dict[str, str]:
    """The content of a file that a recipe names, by its name; empty for anything else."""
    if not isinstance(named, str) or len(named) > 4096 or "{" in named or not Path(named).is_file():
        return {}
    return {named: Path(named).read_text()}


def compare_models(
    recipe: Recipe, run: RunFolder, processes: Processes, weights: Mapping[str, str]
) -> Comparison | None:
    """Measure what has not been measured yet and write `report/`. None when no stage has eval data. Collective.

    `weights` are the hashes of the stages' final models.
    """
    plan = plan_of(recipe)
    if plan is None:
        return None
    bench = bench_of(recipe, plan, lambda path: locate(run, path))
    keys = _Keys(recipe, plan, weights, bench)
    waiting = [name for name in plan.models if _read(run, name, keys.of(name)) is None]
    processes.barrier()
    if waiting:
        _measure(recipe, run, plan, bench, waiting, keys, processes)
    processes.barrier()
    measured = {name: _read(run, name, keys.of(name)) or Measured({}) for name in plan.models}
    table = _table(recipe, run, plan, measured, keys.shared).model_copy(update={"weights": dict(weights)})
    curves = {name: run.stage(name).metrics.read() for name in recipe.stages}
    return Comparison(table, write_report(run.report, table, curves) if processes.is_main else [])


def _table(recipe: Recipe, run: RunFolder, plan: Plan, measured: Mapping[str, Measured], measured_on: str) -> Table:
    """From what was measured of the models, and what their training logged."""
    pairs = {name: one.pairs for name, one in measured.items()}
    splits = ["eval", *(["train"] if plan.train_pairs else [])] if measured[INITIAL].pairs else []
    compared = rewards_of(recipe, plan) if recipe.report.reward_accuracy and splits else []
    table = Table(
        kl_to=stage_of(plan.target) or plan.target,
        results=[_row(recipe, run, name, one, measured, name in plan.scalar) for name, one in measured.items()],
        reward=(stage_of(plan.reward) or plan.reward) if plan.reward else "",
        rewards=[
            RewardResult(
                name=one.name,
                kind=one.kind,
                right={split: [one.right(pairs, split)] for split in splits},
                measured_on=measured_on,
            )
            for one in compared
        ],
        columns=None if recipe.report.columns is None else list(recipe.report.columns),
        measured_on=measured_on,
    )
    logged = {name: run.stage(name).metrics.path for name in recipe.stages}
    logs = {name: {"": read_logs(path)[0]} for name, path in logged.items() if path.is_file()}
    return with_steps_to_reward(table, logs, recipe.report.threshold_metric, recipe.report.threshold)


def _row(
    recipe: Recipe, run: RunFolder, name: str, one: Measured, measured: Mapping[str, Measured], scalar: bool
) -> ModelResult:
    if name == INITIAL:
        return ModelResult(name=name, objective="", metrics=one.metrics)
    metrics = dict(one.metrics)
    if one.pairs.get("eval"):
        reward = Reward("score", name, None) if scalar else Reward("implicit", name, INITIAL)
        right = reward.right({name: one.pairs, INITIAL: measured[INITIAL].pairs}, "eval")
        metrics = {"reward_accuracy": right.count("1") / len(right), **metrics}
    folder = run.stage(name)
    metrics |= training_metrics(folder.read_done(), folder.metrics.read())
    return ModelResult(name=name, objective=recipe.stages[name].objective.name, metrics=metrics)


def _measure(
    recipe: Recipe, run: RunFolder, plan: Plan, bench: Bench, waiting: list[str], keys: _Keys, processes: Processes
) -> None:
    models = _Models(recipe, run, plan, processes)
    with Steps("comparing models", len(waiting), unit="models", rank=processes.rank) as steps:
        evaluator: Evaluator = evaluator_of(recipe, plan, bench, processes, models.reward())
        for name in waiting:
            if name in plan.scalar:
                measured = evaluator.measure_scores(models.scalar(plan.models[name]), name)
            else:
                measured = evaluator.measure(models.to_evaluate(plan.models[name]))
            if processes.is_main:
                _write(run, name, keys.of(name), measured)
            steps.advance(values={"last": name})


class _Models:
    """Models as they are needed; those that all are compared with stay loaded."""

    def __init__(self, recipe: Recipe, run: RunFolder, plan: Plan, processes: Processes) -> None:
        self._recipe, self._run, self._plan, self._processes = recipe, run, plan, processes
        self._kept: dict[str, PreTrainedModel] = {}

    def to_evaluate(self, path: str) -> ModelToEvaluate:
        initial, kl_to = self._keep(self._plan.initial), self._keep(self._plan.target)
        return ModelToEvaluate(self._kept.get(path) or self._load(path), initial, kl_to)

    def scalar(self, path: str) -> ScalarModel:
        name = stage_of(path)
        section = self._plan.judge.model if name is None else self._recipe.stages[name].model
        model = load_scalar_model(locate(self._run, path), section, trained=False)
        return ScalarModel(on_device(model, self._processes.device))

    def reward(self) -> Scorer | None:
        """What scores everybody's samples; None too where it reads other tokens than the policies write."""
        path, section = self._plan.reward, self._plan.judge.model
        if path is None:
            return None
        tokenizer = load_tokenizer(locate(self._run, self._plan.initial), section)
        theirs = load_tokenizer(locate(self._run, path), section)
        return self.scalar(path) if theirs.get_vocab() == tokenizer.get_vocab() else None

    def _keep(self, path: str) -> PreTrainedModel:
        if path not in self._kept:
            self._kept[path] = self._load(path)
        return self._kept[path]

    def _load(self, path: str) -> PreTrainedModel:
        return load_model(locate(self._run, path), self._plan.judge.model, trained=False)


class _Keys:
    """Hashes of everything that the numbers of a model depend on."""

    def __init__(self, recipe: Recipe, plan: Plan, weights: Mapping[str, str], bench: Bench) -> None:
        self._plan, self._weights, self._bench = plan, weights, bench
        judge, settings = plan.judge, {"samples", "pairs", "batch_size", "max_new_tokens", "seed"}
        self.shared = _sha(
            EVALUATION_VERSION,
            self._identity(plan.initial),
            recipe.report.model_dump(mode="json", include=settings),
            bench.content_hash(),
            [source.path for source in judge.data.eval or []],  # some have an exact reward
            judge.data.max_response_length,
            judge.model.model_dump(mode="json", exclude={"path"}),
            str(pick_dtype(judge.model.dtype)),
        )
        """Of what all models of the table have in common."""

    def of(self, name: str) -> str:
        plan = self._plan
        told = [self.shared, self._identity(plan.models[name]), self._identity(plan.target)]
        reward = "" if plan.reward is None else self._identity(plan.reward)
        return _sha(*told, reward, self._bench.foreign_hash(name))

    def _identity(self, path: str) -> str:
        name = stage_of(path)
        return model_hash(path) if name is None else self._weights[name]


def _sha(*told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(run: RunFolder, name: str, key: str) -> Measured | None:
    path = run.report / "models" / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    if record["key"] != key:
        return None
    pairs = {split: [(chosen, rejected) for chosen, rejected in values] for split, values in record["pairs"].items()}
    return Measured(record["metrics"], pairs)


def _write(run: RunFolder, name: str, key: str, measured: Measured) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in measured.samples)
    write_text(run.report / "samples" / f"{name}.jsonl", lines)
    record = {"key": key, "metrics": measured.metrics, "pairs": measured.pairs}
    write_text(run.report / "models" / f"{name}.json", json.dumps(record) + "\n")
