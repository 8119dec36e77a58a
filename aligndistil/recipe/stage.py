"""`Stage` and `Recipe`: what is left when defaults, overrides and references are resolved and everything is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligndistil.errors import UserError
from aligndistil.objectives.base import Objective
from aligndistil.recipe.graph import stage_of
from aligndistil.recipe.header import Report
from aligndistil.recipe.sections import (
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Logging,
    Model,
    Rollout,
    Train,
)
from aligndistil.recipe.yaml_positions import KeyPath, Node, Position, dotted

_UNWRITTEN = Node(None, Position("recipe"), Position("recipe"))


def _where(written: Node, path: KeyPath) -> str:
    found, rest = written.deepest(path)
    shown = dotted((*found.path, *rest))
    return f"{found.value_at if not rest else found.at}: {shown}" if shown else str(found.at)


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe: an objective, the models it needs and the data it eats."""

    name: str
    objective: Objective
    model: Model
    models: dict[str, str]
    """Just the frozen roles that the objective needs."""
    data: Data
    rollout: Rollout | None
    """None when the stage is off-policy."""
    train: Train
    engine: Engine
    evaluation: Evaluation
    checkpoint: Checkpoint
    logging: Logging
    written: Node = field(default=_UNWRITTEN, repr=False, compare=False)
    """Where each of the fields above was written."""

    @property
    def on_policy(self) -> bool:
        return self.rollout is not None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose models this one uses, without repetition."""
        names = [stage_of(path) for path in (self.model.path, *self.models.values())]
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def where(self, *path: str | int) -> str:
        """`recipes/x.yaml:12:7: stages.dpo.model.path` for `("model", "path")`: how a sentence about a field starts.

        A field that was not written is placed where its section or its stage was.
        """
        return _where(self.written, path)

    def check_processes(self, processes: int) -> None:
        """Raises UserError when a batch cannot be split evenly over this many processes."""
        share = self.train.micro_batch_size * processes
        batch = self.train.batch_size
        if batch % share:
            below, above = batch - batch % share, batch - batch % share + share
            instead = f"{below} or {above}" if below else str(above)
            raise UserError(
                f"{self.where('train', 'batch_size')}: {batch} is not a multiple of micro_batch_size x processes = "
                f"{self.train.micro_batch_size} x {processes}; use {instead}, or another number of processes"
            )

    def resolved(self) -> dict[str, Any]:
        """Every section with every field, in JSON's types; what a stage would look like that relied on no default."""
        sections = {
            "objective": self.objective,
            "model": self.model,
            "data": self.data,
            "rollout": self.rollout,
            "train": self.train,
            "engine": self.engine,
            "evaluation": self.evaluation,
            "checkpoint": self.checkpoint,
            "logging": self.logging,
        }
        plain: dict[str, Any] = {
            name: None if section is None else section.model_dump(mode="json") for name, section in sections.items()
        }
        plain["models"] = {role: path for role, path in self.models.items()}
        if self.train.max_steps is not None:
            del plain["train"]["epochs"]
        return plain


@dataclass(frozen=True)
class Recipe:
    """Stages in an order in which each comes after those it uses."""

    name: str
    output_dir: Path
    stages: dict[str, Stage]
    report: Report
    path: Path
    """The file."""
    source_text: str
    """The file's text, as its author wrote it: without overrides, and without what it extends."""
    written: Node = field(default=_UNWRITTEN, repr=False, compare=False)

    def where(self, *path: str | int) -> str:
        """`recipes/x.yaml:3:1: report.kl_to` for `("report", "kl_to")`."""
        return _where(self.written, path)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default filled in, in JSON's types."""
        return {
            "schema_version": 1,
            "name": self.name,
            "output_dir": str(self.output_dir),
            "report": self.report.model_dump(mode="json"),
            "stages": {name: stage.resolved() for name, stage in self.stages.items()},
        }
