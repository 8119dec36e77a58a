"""The folder of a run as training leaves it, without the training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from aligndistil.recipe import Recipe
from aligndistil.run_folder import Done, RunFolder


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
