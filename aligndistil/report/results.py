"""What was measured of each model, as the tables take it: comparison.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aligndistil.errors import UserError
from aligndistil.files import write_text

INITIAL = "initial"
"""The row of the model that training began from."""
STEPS = "steps_to_reward"
"""The metric that depends on all models of a comparison at once."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measured(_Closed):
    """report/models/NAME.json: what was measured of one model."""

    model_config = ConfigDict(allow_inf_nan=False)

    key: str
    """A hash of everything that the numbers depend on."""
    metrics: dict[str, float]
    values: dict[str, list[float]]
    """What those metrics that are means are the mean of, prompt by prompt."""
    pairs: dict[str, list[list[float]]]
    """By split, of the chosen and the rejected response of each pair: log-probability or score."""


def read_measured(path: Path) -> Measured | None:
    """None where there is no such file, or a damaged one: the model is then measured again."""
    try:
        return Measured.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class ModelResult(_Closed):
    """One row of the comparison. Metric names and units are those of docs/metrics.md."""

    name: str
    """Of the stage, or `initial`; with the run in front where several runs are compared."""
    objective: str
    """Empty for a model that was not trained in this run."""
    method: str = ""
    """What tables and pictures call it, and what shares a colour; empty is the name."""
    setting: str = ""
    """What tells it from other models of the same method: `3 epochs`."""
    metrics: dict[str, float]
    """Means over seeds where there are several. Values that are not finite are left out."""
    errors: dict[str, float] = {}
    """Standard errors of those means that have one: over prompts (or pairs) and seeds; of one seed, over prompts."""
    intervals: dict[str, tuple[float, float]] = {}
    """95 % intervals of the same."""
    spread: dict[str, float] = {}
    """Standard deviation over seeds (n - 1 in the denominator) of each of `metrics`; empty for a single run."""
    per_seed: dict[str, dict[str, float]] = {}
    """The metrics of each seed by its name; empty for a single run."""
    train_seeds: list[int] = []
    """What rows of other runs are paired by."""
    measured_on: str = ""
    """As `Comparison.measured_on`, of this row."""
    values: dict[str, list[list[float]]] = Field(default={}, exclude=True)
    """What metrics are the mean of, (seeds, prompts or pairs), or (seeds, 1). Not in comparison.json."""

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    @property
    def label(self) -> str:
        """What the row is called."""
        return ", ".join(part for part in (self.method or self.name, self.setting) if part)

    @property
    def seeds(self) -> int:
        return max(1, len(self.per_seed))


class RewardResult(_Closed):
    """A reward, and which pairs it ranks right."""

    name: str
    kind: Literal["score", "implicit", "contrastive"]
    """A scalar head's score; what a trained policy says of a response; the log-ratio of two opposite models."""
    of: str = ""
    """The row whose own reward it is; empty for a contrastive one."""
    right: dict[str, list[str]]
    """By split (`train`, `eval`), for each seed: a 1 for every pair whose chosen response has more reward, a 0 for one
    whose rejected response has more, `=` for a tie, which counts as half."""
    measured_on: str = ""
    """As `Comparison.measured_on`: rewards of other pairs have no difference."""

    def shares(self, split: str) -> list[list[float]]:
        """(seeds, pairs) how far each pair is ranked right: 1, 0, or 0.5 for a tie; empty where it was not asked."""
        return [["0=1".index(mark) / 2 for mark in marks] for marks in self.right.get(split, []) if marks]


class ComparedWith(_Closed):
    """A model that the others are measured with: one that divergence is taken to, or that scores samples."""

    name: str
    same_in_all_runs: bool = True
    """False where runs are put together that each have their own."""

    def __str__(self) -> str:
        return self.name if self.same_in_all_runs else f"each run's own {self.name}".rstrip()


class Threshold(_Closed):
    """What `steps_to_reward` counts the steps to."""

    metric: str
    """Of the training log; `eval/...` for one of its evaluations."""
    value: float
    chosen: str
    """How the value came about."""


class Difference(_Closed):
    """How far a model is from the best one of a column, paired by prompt and seed."""

    metric: str
    name: str
    best: str
    mean: float
    """This model's mean less that of the best."""
    low: float
    high: float
    """95 %, of this one difference."""


class Comparison(_Closed):
    """comparison.json."""

    results: list[ModelResult]
    kl_to: ComparedWith | None = None
    """The model that `kl` is measured to; None where nothing was measured here, but logged by other programs."""
    reward: ComparedWith | None = None
    """The model that `reward_score` is the score of."""
    rewards: list[RewardResult] = []
    show_rewards: bool = False
    """Whether the rewards are a table of their own, as `report.reward_accuracy` says."""
    differences: list[Difference] = []
    best: dict[str, str] = {}
    """By metric, the row that is better than every other beyond chance."""
    threshold: Threshold | None = None
    """None when no curve has the metric."""
    threshold_metric: str | None = None
    """What the recipe asks for; null leaves the choice."""
    threshold_value: float | None = None
    """The same."""
    columns: list[str] | None = None
    """What the tables show, as the recipe says; null is the usual choice."""
    measured_on: str = ""
    """A hash of the prompts, pairs and settings that all rows share; empty where they share none."""
    weights: dict[str, str] = {}
    """By stage, the SHA-256 of the final model that was measured; empty where several runs are put together."""
    against: ComparedWith | None = None
    """The model that `pairwise` win rates are against."""
    judged: list[str] = []
    """Who judged the benchmarks, how, and when; and what of it is not as it should be."""
    notes: list[str] = []
    """What a reader of the tables has to know."""

    def row(self, name: str) -> ModelResult:
        return next(result for result in self.results if result.name == name)


def save_results(path: Path, comparison: Comparison) -> None:
    """Write comparison.json, all of it or nothing."""
    write_text(path, comparison.model_dump_json(indent=2) + "\n")


def load_results(path: Path) -> Comparison:
    """Read what `save_results` wrote. Raises UserError when it is something else."""
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is not what this aligndistil writes: run `aligndistil compare RECIPE` again") from None
