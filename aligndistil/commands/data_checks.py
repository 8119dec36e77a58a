"""The data of a recipe's stages, read and checked before any of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aligndistil.batch import DataKind
from aligndistil.data import check_source, sources_of
from aligndistil.errors import ServiceError, UserError
from aligndistil.evaluation.measurements import initial_model, measurements_of, read_eval_set
from aligndistil.evaluation.rewards import text_reader
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.training import (
    Longest,
    StageData,
    check_lengths,
    check_positions,
    data_lines,
    load_stage_data,
    model_lines,
)


@dataclass(frozen=True, slots=True)
class ReadStage:
    """A stage's data, and what is to be said of them."""

    data: StageData
    lines: list[str]


def existing(recipe: Recipe, path: str) -> str:
    """A model that is there before training: of `stage:NAME`, the one that its training goes back to."""
    name = stage_of(path)
    return path if name is None else initial_model(recipe, recipe.stages[name])


def read_stages(recipe: Recipe, names: Sequence[str], *, rank: int = 0) -> dict[str, ReadStage | ServiceError]:
    """By stage its data, or why the Hub did not give them.

    First all sources are looked at, which takes no time, and then all rows become tokens, which later commands find in
    the cache. Raises UserError, with the place in the recipe where it is about one, when a stage must not start.
    """
    read: dict[str, ReadStage | ServiceError] = {}
    for name in names:
        try:
            _check_sources(recipe.stages[name])
        except ServiceError as error:
            read[name] = error
    for name in names:
        if name in read:
            continue
        stage = recipe.stages[name]
        try:
            data = load_stage_data(stage, lambda path: existing(recipe, path), rank=rank)
            warnings = check_lengths(stage, data, lambda path: existing(recipe, path))
            warnings += model_lines(stage, lambda path: existing(recipe, path))
            read[name] = ReadStage(data, data_lines(stage, data) + warnings)
        except ServiceError as error:
            read[name] = error
        except UserError as error:
            field, _, rest = str(error).partition(": ")
            if field not in ("data.train", "data.eval", "model.chat_template_kwargs"):
                raise
            raise type(error)(f"{stage.where(*field.split('.'))}: {rest}") from error
    if set(names) == set(recipe.stages) and not any(isinstance(one, ServiceError) for one in read.values()):
        _check_comparison(recipe, read)
    return {name: read[name] for name in names}


def _check_sources(stage: Stage) -> None:
    kind = DataKind.PROMPTS if stage.on_policy else stage.objective.data
    sides: list[Literal["train", "eval"]] = ["train"] if stage.data.held_out else ["train", "eval"]
    for which in sides:
        for number, source in enumerate(sources_of(stage.data, which)):
            try:
                check_source(source, kind, reverse=stage.data.reverse_preferences)
            except UserError as error:
                raise type(error)(f"{stage.where('data', which, number, 'path')}: {error}") from None


def _check_comparison(recipe: Recipe, read: dict[str, ReadStage | ServiceError]) -> None:
    """Whether the comparison at the end can read its pairs, and sample from all language models."""
    measurements = measurements_of(recipe)
    if measurements is None:
        return
    stage, settings = measurements.reference_stage, recipe.report
    of_stage = read[stage.name]
    assert isinstance(of_stage, ReadStage)
    eval_set = read_eval_set(measurements, lambda path: existing(recipe, path))
    if settings.reward is not None:
        try:
            text_reader(measurements, eval_set, lambda path: existing(recipe, path))
        except UserError as error:
            raise type(error)(f"{recipe.where('report', 'reward')}: {error}") from None
    prompt = max((len(ids) for ids in eval_set.prompts), default=0)
    field = "report.max_new_tokens" if settings.max_new_tokens else "data.max_response_length"
    sampled = Longest(
        f"the longest prompt of the comparison with {field}",
        prompt + (settings.max_new_tokens or stage.data.max_response_length),
        f"{field} and data.max_prompt_length",
    )
    models = {
        recipe.stages[name].where("model", "path"): path
        for name, path in measurements.models.items()
        if name in recipe.stages and name not in measurements.scalar
    }
    models.setdefault(recipe.where("report", "kl_to"), measurements.kl_to)
    of_stage.lines.extend(check_positions([sampled], models, stage.model, lambda path: existing(recipe, path)))
