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

    terms_BT: Mapping[str, Tensor]
    """Of all rows of the step batch; empty where only means were wanted."""
    sums: Sums
    """Over all micro-batches and processes."""

    def terms(self, rows: Sequence[int], width: int) -> dict[str, Tensor]:
        """What the loss of some rows is given: the means over the whole step batch, and their own terms."""
        # float64, since variances are differences of them
        means = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.sums.means().items()}
        return means | {name: values[list(rows), :width] for name, values in self.terms_BT.items()}


def prepare(engine: Engine, batch: StepBatch, state: State) -> PreparedBatch:
    """Let the objective look at the whole step batch, or at its mismatched rows, without gradient. Collective."""
    prepares = engine.objective.prepares
    if prepares is Prepares.NOTHING:
        return PreparedBatch({}, Sums())
    if prepares is Prepares.MISMATCHED:
        return prepare_mismatched(engine, [(one, True) for one in batch.mismatched], state)
    prepared, sums = engine.prepare(batch.batch, batch.micro_batches, state), Sums()
    for name, metric in prepared.metrics.items():
        sums.add_metric(name, metric)
    sums.reduce(engine.processes)
    return PreparedBatch(prepared.terms, sums)


def prepare_mismatched(engine: Engine, batches: Sequence[tuple[Batch, bool]], state: State) -> PreparedBatch:
    """The means over mismatched rows; those of a batch marked False are read and not counted. Collective."""
    sums = Sums()
    for batch, counts in batches:
        prepared = engine.prepare(batch, [range(batch.rows)], state)
        for name, (total, count) in prepared.metrics.items():
            sums.add_metric(name, Metric(total * float(counts), count * float(counts)))
    sums.reduce(engine.processes)
    return PreparedBatch({}, sums)
