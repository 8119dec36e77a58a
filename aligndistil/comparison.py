"""The table and the picture at the end of a recipe: every model measured on the same prompts and pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from aligndistil.artefacts import RunFolder
from aligndistil.artefacts.files import write_text
from aligndistil.batch import DataKind
from aligndistil.data import Examples, content_hash, gives, load_examples
from aligndistil.engine.processes import Processes
from aligndistil.evaluation import Evaluator, Measured, ModelToEvaluate
from aligndistil.launch import scorer_of
from aligndistil.models import load_model, load_tokenizer, model_hash, stop_ids
from aligndistil.objectives.base import Role
from aligndistil.progress import Steps
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.report import ModelResult, write_report
from aligndistil.rollout import SamplingParams

INITIAL = "initial"
EVALUATION_VERSION = "1"
"""Raised when the same models get other numbers than before."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row per model, initial model first."""

    results: list[ModelResult]
    kl_label: str
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


def initial_model(recipe: Recipe, stage: Stage) -> str:
    """What the training of a stage goes back to, through the stages it starts from."""
    while (name := stage_of(stage.model.path)) is not None:
        stage = recipe.stages[name]
    return stage.model.path


def kl_target(recipe: Recipe, judge: Stage) -> str:
    """What divergence is measured to: as the recipe says, or the teacher of the last stage that has one."""
    teachers = [stage.models[Role.TEACHER] for stage in recipe.stages.values() if Role.TEACHER in stage.models]
    return recipe.report.kl_to or (teachers[-1] if teachers else initial_model(recipe, judge))


def compare_models(
    recipe: Recipe, run: RunFolder, processes: Processes, fingerprints: Mapping[str, str]
) -> Comparison | None:
    """Measure what has not been measured yet and write `report/`. None when no stage has eval data. Collective."""
    judge = next((stage for stage in reversed(recipe.stages.values()) if stage.data.eval), None)
    if judge is None:
        return None
    target = kl_target(recipe, judge)
    models = {INITIAL: initial_model(recipe, judge)} | {name: f"stage:{name}" for name in recipe.stages}
    keys = {name: _key(recipe, judge, path, target, fingerprints) for name, path in models.items()}
    cache = run.report / "models"
    waiting = [name for name in models if _read(cache / f"{name}.json", keys[name]) is None]
    processes.barrier()
    if waiting:
        _measure(recipe, run, judge, {name: models[name] for name in waiting}, target, keys, processes)
    processes.barrier()
    results = [_row(recipe, run, name, _read(cache / f"{name}.json", keys[name]) or {}) for name in models]
    label = stage_of(target) or target
    curves = {name: run.stage(name).metrics.read() for name in recipe.stages}
    files = write_report(run.report, results, curves, label) if processes.is_main else []
    return Comparison(results, label, files)


def _measure(
    recipe: Recipe,
    run: RunFolder,
    judge: Stage,
    models: Mapping[str, str],
    target: str,
    keys: Mapping[str, str],
    processes: Processes,
) -> None:
    loaded: dict[str, PreTrainedModel] = {}

    def load(path: str) -> PreTrainedModel:
        where = locate(run, path)
        if where not in loaded:
            loaded[where] = load_model(where, judge.model, trained=False)
        return loaded[where]

    initial = initial_model(recipe, judge)
    with Steps("comparing models", len(models), unit="models", rank=processes.rank) as steps:
        evaluator = _evaluator(recipe, judge, initial, processes)
        for name, path in models.items():
            measured = evaluator.measure(ModelToEvaluate(load(path), load(initial), load(target)))
            if processes.is_main:
                _write(run, name, keys[name], measured)
            loaded = {where: m for where, m in loaded.items() if where in (locate(run, initial), locate(run, target))}
            steps.advance(values={"last": name})


def _evaluator(recipe: Recipe, judge: Stage, initial: str, processes: Processes) -> Evaluator:
    """Prompts and pairs are the judge stage's eval data, with preferences the right way round."""
    tokenizer = load_tokenizer(initial, judge.model)
    stops = stop_ids(initial, judge.model, tokenizer)
    data = judge.data.model_copy(update={"reverse_preferences": False})
    settings = recipe.report

    def load(kind: DataKind) -> Examples:
        return load_examples(data, "eval", kind, tokenizer, stops, tokenizer.chat_template, seed=judge.train.seed)

    prompts = load(DataKind.PROMPTS)
    pairs = load(DataKind.PAIRS) if gives(data, "eval", DataKind.PAIRS) else None
    return Evaluator(
        tokenizer=tokenizer,
        stop_ids=stops,
        prompts=[prompts.prompt_ids(i) for i in range(min(settings.samples, len(prompts)))],
        pairs=[] if pairs is None else [pairs.rows(i) for i in range(len(pairs))],
        params=SamplingParams(settings.max_new_tokens or data.max_response_length),
        batch_size=settings.batch_size,
        seed=judge.train.seed,
        processes=processes,
        scorer=scorer_of(data),
    )


def _read(path: Path, key: str) -> dict[str, float] | None:
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    metrics: dict[str, float] = record["metrics"]
    return metrics if record["key"] == key else None


def _write(run: RunFolder, name: str, key: str, measured: Measured) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in measured.samples)
    write_text(run.report / "samples" / f"{name}.jsonl", lines)
    write_text(run.report / "models" / f"{name}.json", json.dumps({"key": key, "metrics": measured.metrics}, indent=2))


def _key(recipe: Recipe, judge: Stage, path: str, target: str, fingerprints: Mapping[str, str]) -> str:
    """Of everything the numbers of one model depend on."""

    def identity(model: str) -> str:
        name = stage_of(model)
        return model_hash(model) if name is None else fingerprints[name]

    told = [
        EVALUATION_VERSION,
        identity(path),
        identity(initial_model(recipe, judge)),
        identity(target),
        recipe.report.model_dump(mode="json", exclude={"kl_to"}),
        judge.data.model_dump(mode="json", exclude={"train", "reverse_preferences"}),
        [content_hash(source) for source in judge.data.eval or []],
        judge.model.model_dump(mode="json"),
        text_of_file(judge.model.chat_template),
        judge.train.seed,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _row(recipe: Recipe, run: RunFolder, name: str, metrics: dict[str, float]) -> ModelResult:
    if name == INITIAL:
        return ModelResult(name=name, objective="", metrics=metrics)
    done = run.stage(name).read_done()
    trained = {} if done is None else {"steps": float(done.step), "seconds": done.seconds}
    return ModelResult(name=name, objective=recipe.stages[name].objective.name, metrics=metrics | trained)
