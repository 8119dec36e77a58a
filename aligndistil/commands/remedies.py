"""What makes a stage take less memory, in the order of what it costs, each with what the stage then takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from aligndistil.commands.cards import Card
from aligndistil.errors import UserError
from aligndistil.objectives.base import Prepares
from aligndistil.recipe import Lora, Stage
from aligndistil.training.memory import Models, memory

_CARDS = (2, 4, 8)
"""How many times the processes that were asked for are tried."""
_CHUNK = 256
"""Tokens at once below which the products with the head become slow on a card."""


@dataclass(frozen=True, slots=True)
class Change:
    """One field of a stage, or its processes, changed."""

    text: str
    apply: Callable[[Stage], Stage]
    times: int = 1
    """By which the processes are multiplied."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change or several together."""

    texts: tuple[str, ...]
    gib: float
    """What the stage then takes of each process."""
    fits: bool
    best: bool = False
    """Whether it is the first that fits."""


def remedies(stage: Stage, models: Models, processes: int, card: Card) -> list[Remedy]:
    """Each change that helps alone, in the order of cost, and the cheapest that fits, or combination, marked.

    Combinations are cheaper the cheaper their dearest change is, and then the fewer they are.
    """
    changes = _changes(stage, processes)

    def tried(some: Sequence[Change]) -> Remedy:
        changed, times = stage, 1
        for change in some:
            changed, times = change.apply(changed), times * change.times
        gib = memory(changed, models, processes * times, device=card.device, card=card.memory).total
        return Remedy(tuple(change.text for change in some), gib, card.fits(gib, processes * times) == "yes")

    before = tried([]).gib
    alone = [tried([change]) for change in changes]
    shown = [one for one in alone if one.gib < 0.99 * before]
    for dearest, one in enumerate(alone):
        if one.fits:
            return [replace(other, best=other is one) for other in shown]
        for count in range(1, dearest + 1):
            for others in combinations(changes[:dearest], count):
                together = [*others, changes[dearest]]
                if sum(change.times > 1 for change in together) < 2 and (found := tried(together)).fits:
                    return [*shown, replace(found, best=True)]
    return shown


def _changes(stage: Stage, processes: int) -> list[Change]:
    """Those that this stage can make, the cheapest first."""
    model, train, engine, objective = stage.model, stage.train, stage.engine, stage.objective
    changes: list[Change] = []
    if not model.gradient_checkpointing:
        changes.append(_field("model", gradient_checkpointing=True))
    if train.micro_batch_tokens is not None:
        changes.append(_field("train", micro_batch_tokens=1))
    elif train.micro_batch_size > 1:
        changes.append(_field("train", micro_batch_size=1))
    if not objective.is_scalar and (engine.chunk_tokens == "auto" or engine.chunk_tokens > _CHUNK):
        changes.append(_field("engine", chunk_tokens=_CHUNK))
    known = not stage.on_policy and objective.prepares is Prepares.NOTHING and stage.models
    if known and not engine.teacher_cache:
        changes.append(_field("engine", teacher_cache=True))
    if model.lora is None:
        changes.append(Change("model.lora: {r: 16}", _field("model", lora=Lora()).apply))
    if engine.zero_stage < 3:
        sharded = _field("engine", zero_stage=3)
        if processes > 1:
            changes.append(sharded)
        for times in (times for times in _CARDS if _divides(stage, processes * times)):
            changes.append(Change(f"{sharded.text} with --processes {processes * times}", sharded.apply, times))
    if engine.offload == "none":
        changes.append(_field("engine", zero_stage=max(engine.zero_stage, 2), offload="optimizer"))
    if engine.offload != "parameters":
        changes.append(_field("engine", zero_stage=3, offload="parameters"))
    return changes


def _field(section: str, **values: object) -> Change:
    def apply(stage: Stage) -> Stage:
        given = getattr(stage, section)
        # Of changes together, the further one counts.
        least = {"zero_stage": max(given.zero_stage, values["zero_stage"])} if "zero_stage" in values else {}
        return stage.model_copy(update={section: given.model_copy(update={**values, **least})})

    text = ", ".join(f"{section}.{name}: {str(value).lower()}" for name, value in values.items())
    return Change(text, apply)


def _divides(stage: Stage, processes: int) -> bool:
    try:
        stage.check_processes(processes)
    except UserError:
        return False
    return True
