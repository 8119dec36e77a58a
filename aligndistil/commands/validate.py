"""`aligndistil validate`: check a recipe without training, and show its rows as tokens."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from aligndistil.commands.train import check_recipe
from aligndistil.data import preview
from aligndistil.evaluation.measurements import initial_model
from aligndistil.recipe import Recipe, Stage
from aligndistil.training import load_stage_data


def check(recipe: Recipe, processes: int) -> Iterator[str]:
    """One line a stage, once everything that needs no data or weights has been checked."""
    check_recipe(recipe, processes)
    yield f"[green]✓[/] {escape(str(recipe.path))}: {len(recipe.stages)} stage(s) for {processes} process(es)"
    for stage in recipe.stages.values():
        against = ", ".join(f"{role} {path}" for role, path in stage.models.items())
        policy = "on-policy" if stage.on_policy else "off-policy"
        what = f"{stage.objective.name} ({policy}) from {stage.model.path}" + (f" against {against}" if against else "")
        yield f"  [bold]{stage.name}[/]: {escape(what)}"


def with_existing_model(recipe: Recipe, stage: Stage) -> Stage:
    """The stage with a model that exists before training: the tokenizer of `stage:NAME` is that of its own model."""
    model = stage.model.model_copy(update={"path": initial_model(recipe, stage)})
    return stage.model_copy(update={"model": model})


def rows(recipe: Recipe, count: int) -> Iterator[RenderableType]:
    """The first rows of each stage's training data, prompt and response tokens in two colours, and what was dropped."""
    for stage in recipe.stages.values():
        data = load_stage_data(with_existing_model(recipe, stage), str)
        yield Text(f"\n{stage.name}: {len(data.train)} {data.train.kind}", style="bold")
        for line in data.train.report.lines():
            yield f"  {escape(line)}"
        for index in range(min(count, len(data.train))):
            yield from preview(data.train.rows(index), data.tokenizer)
