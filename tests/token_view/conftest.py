"""A finished run of three stages on random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.recipe import load_recipe
from support.recipes import three_stages
from support.run_folders import finish

ModelFolder = Callable[..., str]


@pytest.fixture
def three_models(model_folder: ModelFolder) -> dict[str, str]:
    return {"dpo": model_folder(seed=1), "reverse": model_folder(seed=2), "policy": model_folder(seed=0)}


@pytest.fixture
def finished(
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    three_models: dict[str, str],
    model_folder: ModelFolder,
) -> Callable[..., Path]:
    """The folder of a run whose recipe is `three_stages` with these sections changed."""

    def make(**sections: Any) -> Path:
        recipe = load_recipe(recipe_file(three_stages(model_folder(seed=0), pairs_file(10), **sections)))
        return finish(recipe, three_models)

    return make
