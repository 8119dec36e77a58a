"""What was measured of each model, as the tables take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

from aligndistil.artefacts.files import write_text


class ModelResult(BaseModel):
    """One row of the comparison. Metric names and units are those of docs/metrics.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    objective: str
    """Empty for a model that was not trained in this run."""
    metrics: dict[str, float]
    """Values that are not finite are left out."""

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


class Comparison(BaseModel):
    """comparison.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kl_to: str
    """The model that `kl` is measured to."""
    results: list[ModelResult]


def save_results(path: Path, results: Sequence[ModelResult], kl_label: str) -> None:
    """Write comparison.json, all of it or nothing."""
    write_text(path, Comparison(kl_to=kl_label, results=list(results)).model_dump_json(indent=2) + "\n")


def load_results(path: Path) -> Comparison:
    """Read what `save_results` wrote."""
    return Comparison.model_validate_json(path.read_bytes())
