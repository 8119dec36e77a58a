"""`aligndistil validate`: check a recipe and its data without training, and show its rows as tokens."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from aligndistil.commands.contradictions import contradictions
from aligndistil.commands.data_checks import ReadStage, read_stages
from aligndistil.commands.train import check_recipe
from aligndistil.data import preview
from aligndistil.errors import for_console
from aligndistil.recipe import Recipe


def check(recipe: Recipe, processes: int, count: int = 0) -> Iterator[RenderableType]:
    """One line a stage, once everything that needs no weights has been checked; of `count` rows also the tokens.

    Rows are the first of each stage's training data, prompt and response in two colours. What the Hub does not give is
    named, and not checked.
    """
    check_recipe(recipe, processes)
    read = read_stages(recipe, list(recipe.stages))
    yield f"[green]✓[/] {for_console(recipe.path)}: {len(recipe.stages)} stage(s) for {processes} process(es)"
    yield from (f"[yellow]![/] {for_console(line)}" for line in contradictions(recipe, read))
    for stage in recipe.stages.values():
        against = ", ".join(f"{role} {path}" for role, path in stage.models.items())
        policy = "on-policy" if stage.on_policy else "off-policy"
        what = f"{stage.objective.name} ({policy}) from {stage.model.path}" + (f" against {against}" if against else "")
        yield f"  [bold]{stage.name}[/]: {for_console(what)}"
        of_stage = read[stage.name]
        if not isinstance(of_stage, ReadStage):
            yield f"    [yellow]data not checked[/]: {for_console(of_stage)}"
    for name, of_stage in read.items():
        if isinstance(of_stage, ReadStage):
            yield Text(f"\n{name}: {len(of_stage.data.train)} {of_stage.data.train.kind}", style="bold")
            yield from (f"  {for_console(line)}" for line in of_stage.lines)
            yield from _rows(of_stage, count)


def _rows(read: ReadStage, count: int) -> Iterator[Text]:
    data = read.data
    for index in range(min(count, len(data.train))):
        rows = data.train.rows(index)
        labels = ("chosen", "rejected") if len(rows) == 2 else ("" if rows[0].label else "undesirable",)
        yield from preview(rows, data.tokenizer, data.stop_ids, labels)
