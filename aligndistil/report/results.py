"""What was measured of each model, as the tables take it: comparison.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from aligndistil.errors import UserError
from aligndistil.files import write_text

INITIAL = "initial"
"""The row of the model that training began from."""
EACH_OWN = "each run's own"
"""What a model that is compared with is called where it is not the same in all runs."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelResult(_Closed):
    """One row of the comparison. Metric names and units are those of docs/metrics.md."""

    name: str
    objective: str
    """Empty for a model that was not trained in this run."""
    metrics: dict[str, float]
    """Means over seeds where there are several. Values that are not finite are left out."""
    per_seed: dict[str, dict[str, float]] = {}
    """The metrics of each seed by its name; empty for a single run."""
    spread: dict[str, float] = {}
    """Standard deviation over seeds (n - 1 in the denominator) of each of `metrics`."""

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


class RewardResult(_Closed):
    """A reward, and which pairs it ranks right."""

    name: str
    kind: Literal["score", "implicit", "contrastive"]
    """A scalar head's score; the log-ratio of a trained model to its reference; that of two opposite models."""
    right: dict[str, list[str]]
    """By split (`train`, `eval`), for each seed: a 1 for every pair whose chosen response has more reward, else a 0."""
    measured_on: str = ""
    """As `Comparison.measured_on`: rewards of other pairs have no difference."""


class Threshold(_Closed):
    """What `steps_to_reward` counts the steps to."""

    metric: str
    """Of the training log; `eval/...` for one of its evaluations."""
    value: float
    chosen: str
    """How the value came about."""


class Comparison(_Closed):
    """comparison.json."""

    kl_to: str
    """The model that `kl` is measured to."""
    results: list[ModelResult]
    reward: str = ""
    """The model that `reward_score` is the score of; empty when there is none."""
    rewards: list[RewardResult] = []
    threshold: Threshold | None = None
    """None when no curve has the metric."""
    threshold_metric: str | None = None
    """What the recipe asks for; null leaves the choice."""
    threshold_value: float | None = None
    """The same."""
    columns: list[str] | None = None
    """What the tables show, as the recipe says; null is the usual choice."""
    measured_on: str = ""
    """A hash of the prompts, pairs and settings that all rows share."""
    weights: dict[str, str] = {}
    """By stage, the SHA-256 of the final model that was measured; empty where several runs are put together."""
    notes: list[str] = []
    """What a reader of the tables has to know."""


def save_results(path: Path, comparison: Comparison) -> None:
    """Write comparison.json, all of it or nothing."""
    write_text(path, comparison.model_dump_json(indent=2) + "\n")


def load_results(path: Path) -> Comparison:
    """Read what `save_results` wrote. Raises UserError when it is something else."""
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is not what this aligndistil writes: run `aligndistil compare RECIPE` again") from None
