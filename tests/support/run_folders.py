"""The folder of a run as training leaves it: written without the training, and read to be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aligndistil.recipe import Recipe
from aligndistil.run_folder import Done, RunFolder

TIMES = ("perf/", "rollout/tokens_per_second")
"""Metrics that are measured with a clock."""


def finish(recipe: Recipe, models: Mapping[str, str]) -> Path:
    """Each stage of `models` ends with a copy of that model folder, in the order given."""
    run = RunFolder(recipe.output_dir)
    for name, model in models.items():
        stage, folder = recipe.stages[name], run.stage(name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_resolved(stage.resolved())
        shutil.copytree(model, folder.final, dirs_exist_ok=True)
        inputs = {one: f"weights of {one}" for one in stage.inputs}
        folder.write_done(
            Done(
                fingerprint="",
                weights=f"weights of {name}",
                inputs=inputs,
                step=3,
                seconds=1.0,
                metrics={},
                resolved=stage.resolved(),
            )
        )
    return run.path


def lines(stage: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    read = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in read]


def left_behind(stage: Path) -> dict[str, Any]:
    """Everything of a finished stage that must not depend on how often it was interrupted."""
    done = json.loads((stage / "done.json").read_text())
    metrics = {key: value for key, value in done["metrics"].items() if not key.startswith(TIMES)}
    weights = {file.name: file.read_bytes() for file in (stage / "final").glob("*.safetensors")}
    samples = {file.name: file.read_text() for file in sorted((stage / "samples").glob("*.jsonl"))}
    return {"lines": lines(stage), "metrics": metrics, "step": done["step"], "weights": weights, "samples": samples}


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """Names of what is not the same, so that a failure does not print weights."""
    yield from (key for key in one if one[key] != other[key])
