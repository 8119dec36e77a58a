"""`aligndistil train --dry-run`: what would be trained, whether it fits a card, and how long it may take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from rich.console import RenderableType

from aligndistil.commands.cards import SHARE_OF_PEAK, USABLE, Card, card_of
from aligndistil.commands.contradictions import contradictions
from aligndistil.commands.data_checks import ReadStage, existing, read_stages
from aligndistil.commands.estimate import Cost, cost, cost_at_most, operations
from aligndistil.commands.plan_tables import Planned, model_table, remedy_table, stage_tables
from aligndistil.commands.remedies import remedies
from aligndistil.commands.standing import Standing, fingerprint_of, standing
from aligndistil.commands.train import check_recipe, stages_wanted
from aligndistil.engine.processes import Processes
from aligndistil.errors import ServiceError, for_console
from aligndistil.evaluation.measurements import initial_model
from aligndistil.models import configuration, model_size
from aligndistil.objectives.base import Role
from aligndistil.recipe import Recipe, Stage, stage_of
from aligndistil.run_folder import RunFolder
from aligndistil.training import is_code, planned_models
from aligndistil.training.memory import Models, in_half, memory, models_of


def plan(
    recipe: Recipe,
    only: str | None,
    processes: int,
    *,
    card: Card | None = None,
    fresh: bool = False,
    verify: bool = False,
    allow_code: bool = False,
    width: int | None = None,
) -> Iterator[RenderableType]:
    """What `train` would do, in tables for a terminal of `width` columns: this one's, by default.

    `card` is what is planned for: by default what is there.
    """
    check_recipe(recipe, processes)
    RunFolder(recipe.output_dir).check(recipe.name)
    wanted, card, unread = stages_wanted(recipe, only), card or card_of(None, None), set[str]()
    read = read_stages(recipe, wanted)
    yield from (f"[yellow]![/] {for_console(line)}" for line in contradictions(recipe, read))
    asked = {"fresh": fresh, "verify": verify, "allow_code": allow_code}
    stages = list(planned(recipe, read, processes, card, unread, **asked))
    yield from stage_tables(stages, width)
    for stage in stages:
        if stage.standing.why != "to train":
            yield f"[bold]{stage.name}[/]: {for_console(stage.standing.why)}"
    yield ""
    yield model_table({one.name: _paths(recipe.stages[one.name], one.models) for one in stages})
    yield ""
    lines = {one.name: [*_held(recipe.stages[one.name], recipe)] for one in stages}
    for name, one in read.items():
        lines[name] += one.lines if isinstance(one, ReadStage) else []
    yield from (f"[bold]{names}[/]: {for_console(line)}" for line, names in _grouped(lines))
    yield from _what_to_change(stages, card)
    yield " ".join(_assumptions(recipe, stages, card, processes, unread))


def planned(
    recipe: Recipe,
    read: Mapping[str, ReadStage | ServiceError],
    processes: int,
    card: Card,
    unread: set[str],
    *,
    fresh: bool = False,
    verify: bool = False,
    allow_code: bool = False,
) -> Iterator[Planned]:
    """The stages whose data were asked for; `unread` is given what the Hub did not give."""
    weights: dict[str, str | None] = {}
    for name, of_stage in read.items():
        stage, found = recipe.stages[name], _standing(recipe, name, weights, fresh, verify, allow_code)
        weights[name] = found.done.weights if found.action == "skip" and found.done is not None else None
        models, taken = _models(recipe, stage, unread), _taken(recipe, stage, of_stage, unread)
        if models is None:
            yield Planned(name, stage.objective.name, found, taken, None, None, None, None)
            continue
        needed = memory(stage, models, processes, device=card.device, card=card.memory)
        fits = card.fits(needed.total, processes)
        counted = taken is not None and (in_half(stage, card.device, models.policy.hidden) or card.device == "cpu")
        hours = card.hours(operations(stage, models, taken), processes) if taken is not None and counted else None
        change = remedies(stage, models, processes, card) if fits in ("no", "tight") else []
        yield Planned(name, stage.objective.name, found, taken, models, needed, fits, hours, change)


def _standing(
    recipe: Recipe, name: str, weights: Mapping[str, str | None], fresh: bool, verify: bool, allow_code: bool
) -> Standing:
    """What becomes of a stage, as far as it can be known without the Hub and without somebody's code."""
    stage, folder = recipe.stages[name], RunFolder(recipe.output_dir).stage(name)
    there = folder.path.is_dir() and any(folder.path.iterdir())
    if not allow_code and any(map(is_code, stage.models.values())):
        unknown = "with --allow-code it is said whether it is trained again"
        return Standing("train", unknown if there else "to train", None)
    try:
        fingerprint = fingerprint_of(stage, folder, weights)
    except ServiceError:
        unknown = "trained again if anything changed, which the Hub cannot be reached to say"
        return Standing("train", unknown if there else "to train", None)
    alone = Processes(0, 1, torch.device("cpu"))
    return standing(stage, folder, weights, fingerprint, fresh=fresh, verify=verify, processes=alone)


def _models(recipe: Recipe, stage: Stage, unread: set[str]) -> Models | None:
    """None where a configuration is on the Hub and neither the Hub nor this package gives it."""

    def root(path: str) -> str:
        found = existing(recipe, path)
        if isinstance(configuration(found, stage.model.trust_remote_code), ServiceError):
            unread.add(found)
        return found

    try:
        return models_of(stage, root, lambda path: trained_on(recipe, path))
    except ServiceError:
        return None


def trained_on(recipe: Recipe, path: str) -> tuple[str, int]:
    """The weights that a model's adapters are trained on, and the parameters of these; without adapters, its own."""
    stage = recipe.stages.get(stage_of(path) or "")
    lora = stage.model.lora if stage is not None else None
    if stage is None or lora is None:
        return path, 0
    size = model_size(existing(recipe, path), trust_remote_code=stage.model.trust_remote_code)
    return trained_on(recipe, stage.model.path)[0], size.adapters(lora.r, lora.target_modules)


def _taken(recipe: Recipe, stage: Stage, read: ReadStage | ServiceError, unread: set[str]) -> Cost | None:
    """Examples, steps and tokens of training; where the Hub does not give the data, no more than there can be."""
    if isinstance(read, ReadStage):
        return cost(stage, read.data.train)
    if not unread & {initial_model(recipe, stage)}:
        unread |= {source.path for source in stage.data.train}
    return cost_at_most(stage)


def _paths(stage: Stage, models: Models | None) -> dict[str, tuple[str, int | None]]:
    """By role the path of the model, and its parameters where they are known."""
    policy = models.policy.parameters if models else None
    found: dict[str, tuple[str, int | None]] = {Role.POLICY: (stage.model.path, policy)}
    for role, path in stage.models.items():
        found[role] = (path, models.others[role].parameters if models and role in models.others else None)
    return found


def _held(stage: Stage, recipe: Recipe) -> Iterator[str]:
    """What each model of a stage with adapters is."""
    for role, what in planned_models(stage, recipe).items():
        yield f"{role.replace('_', ' ')}: {what}"


def _grouped(lines: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, str]]:
    """Each line once, with the stages that it is about."""
    names: dict[str, list[str]] = {}
    for name, said in lines.items():
        for line in said:
            names.setdefault(line, []).append(name)
    return ((line, ", ".join(about)) for line, about in names.items())


def _what_to_change(stages: Sequence[Planned], card: Card) -> Iterator[RenderableType]:
    """A table for the stages that do not fit, those that take the same together."""
    groups: dict[tuple[object, ...], list[Planned]] = {}
    for stage in stages:
        if stage.remedies and stage.memory is not None:
            key = (round(stage.memory.total, 2), *((one.texts, round(one.gib, 2)) for one in stage.remedies))
            groups.setdefault(key, []).append(stage)
    for group in groups.values():
        first = group[0]
        assert first.memory is not None
        names = ", ".join(stage.name for stage in group)
        verb = ("fits" if len(group) == 1 else "fit") + (" only just" if first.fits == "tight" else "")
        does = verb if first.fits == "tight" else f"{'does' if len(group) == 1 else 'do'} not fit"
        yield (
            f"\n[bold]{for_console(names)}[/] {does}: {first.memory.total:.1f} GiB a process. What makes it less, the "
            "cheapest first:"
        )
        yield remedy_table(first.remedies)
        if not any(one.best for one in first.remedies):
            yield "Nothing of this, alone or together, is enough: take a smaller model, shorter rows or a larger card."


def _assumptions(
    recipe: Recipe, stages: Sequence[Planned], card: Card, processes: int, unread: set[str]
) -> Iterator[str]:
    yield (
        "\nNothing was trained. Memory is an estimate in GiB of a process, one GPU each, for the longest rows that the "
        "recipe allows; sampling and the optimizer's step are not at the same time as activations and head."
    )
    if card.memory is not None:
        of = "a card" if card.device == "cuda" else "this machine, which its processes share: there is no card"
        yield (
            f"A stage fits that takes at most {USABLE:.0%} of the {card.memory:.3g} GiB of {of}; the rest is for "
            "kernels and fragmentation."
        )
    if card.tflops is not None:
        yield (
            f"Hours are at {SHARE_OF_PEAK:.0%} of {card.tflops:g} TFLOP/s, on {processes} "
            f"card{'s' if processes > 1 else ''}, without evaluation; sampling, which is bound by memory, takes longer."
        )
    if any(one.taken is not None and not one.taken.exact for one in stages) or unread:
        yield (
            "The Hub cannot be reached: sizes of its models and numbers of its rows are those that this package knows, "
            "and every row counts as usable and as long as the recipe allows (≤)."
        )
