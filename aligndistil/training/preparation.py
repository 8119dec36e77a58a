"""What an objective finds out about a whole step batch, before its first gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndistil.batch import Batch
from aligndistil.engine.engine import Engine
from aligndistil.maths import Metric
from aligndistil.objectives.base import Prepares, State
from aligndistil.training.batches import StepBatch
from aligndistil.training.metrics import Sums


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """What is known of a step batch when its gradient is taken."""

    terms_of_micro_batches: Sequence[Mapping[str, Tensor]]
    """(B, T) each; empty where only means were wanted."""
    sums: Sums
    """Over all micro-batches and processes."""

    def terms(self, micro_batch: int) -> dict[str, Tensor]:
        """What the loss of a micro-batch is given: the means over the whole step batch, and its own terms."""
        # float64, since variances are differences of them
        means = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.sums.means().items()}
        return {**means, **self.terms_of_micro_batches[micro_batch]} if self.terms_of_micro_batches else means


def prepare(engine: Engine, batch: StepBatch, state: State) -> PreparedBatch:
    """Let the objective look at the whole step batch, or at its mismatched rows, without gradient. Collective."""
    prepares = engine.objective.prepares
    if prepares is Prepares.NOTHING:
        return PreparedBatch((), Sums())
    if prepares is Prepares.MISMATCHED:
        return prepare_mismatched(engine, [(one, True) for one in batch.mismatched], state)
    sums, terms = Sums(), list[Mapping[str, Tensor]]()
    for part in batch.whole_groups:
        found, metrics = engine.prepare(part, state)
        terms += found
        for name, metric in metrics.items():
            sums.add_metric(name, metric)
    sums.reduce(engine.processes)
    return PreparedBatch(terms, sums)


def prepare_mismatched(engine: Engine, batches: Sequence[tuple[Batch, bool]], state: State) -> PreparedBatch:
    """The means over mismatched rows; those of a batch marked False are read and not counted. Collective."""
    sums = Sums()
    for batch, counts in batches:
        _, metrics = engine.prepare([batch], state)
        for name, (total, count) in metrics.items():
            sums.add_metric(name, Metric(total * float(counts), count * float(counts)))
    sums.reduce(engine.processes)
    return PreparedBatch((), sums)
