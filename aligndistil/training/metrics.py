"""Metrics as totals and counts, added up over micro-batches and reduced over processes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aligndistil.engine.processes import Processes
from aligndistil.maths import Metric, mean_of
from aligndistil.objectives.base import Loss


class Sums:
    """Totals and counts of metrics, reduced over processes at once."""

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self._tensors: dict[str, Metric] = {}
        self._maxima: dict[str, Tensor] = {}
        self.totals: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}
        for name, metric in (metrics or {}).items():
            self.add_metric(name, metric)

    def add(self, loss: Loss, weight: float = 1.0) -> None:
        for name, metric in {"loss": mean_of(loss.per_example), **loss.metrics}.items():
            self.add_metric(name, Metric(metric.total * weight, metric.count * weight))
        for name, value in loss.maxima.items():
            self.add_maximum(name, value * weight)

    def add_metric(self, name: str, metric: Metric) -> None:
        old = self._tensors.get(name)
        total, count = metric.total.detach().double(), metric.count.double()
        self._tensors[name] = Metric(total, count) if old is None else Metric(old.total + total, old.count + count)

    def add_maximum(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._maxima[name] = value if name not in self._maxima else torch.maximum(self._maxima[name], value)

    def put(self, name: str, value: float) -> None:
        """Add a number that is the same on every process, after `reduce`."""
        self.totals[name] = (value, 1.0)

    def adopt(self, other: Sums) -> None:
        """Add what another has reduced already."""
        self.totals |= other.totals
        self.maxima |= other.maxima

    def reduce(self, processes: Processes) -> None:
        """Sum over processes, with one transfer from the device. All have the same names in the same order."""
        if not self._tensors:
            return
        device = next(iter(self._tensors.values())).total.device
        flat = torch.stack([part.to(device) for metric in self._tensors.values() for part in metric])
        pairs = processes.sum(flat).view(-1, 2).tolist()
        self.totals = {name: (total, count) for name, (total, count) in zip(self._tensors, pairs, strict=True)}
        if self._maxima:
            peaks = processes.max(torch.stack([value.to(device) for value in self._maxima.values()]))
            self.maxima = dict(zip(self._maxima, peaks.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        return means_of(self.totals)

    def add_to(self, pending: dict[str, list[float]], maxima: dict[str, float]) -> None:
        for name, (total, count) in self.totals.items():
            old = pending.setdefault(name, [0.0, 0.0])
            pending[name] = [old[0] + total, old[1] + count]
        for name, value in self.maxima.items():
            maxima[name] = max(value, maxima.get(name, value))


def means_of(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric that counts something; numbers of tokens are totals, and left out."""
    return {name: total / count for name, (total, count) in totals.items() if count and name != "num_tokens"}
