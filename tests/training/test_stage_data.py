"""The data of a stage while it is read: what a terminal shows of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console

from aligndistil.recipe import load_recipe
from aligndistil.training import load_stage_data


def test_each_part_has_a_full_bar_of_its_own_and_what_is_in_the_cache_has_none(
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    model_folder: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    content: dict[str, Any] = {
        "model": {"path": model_folder()},
        "models": {"reference": model_folder()},
        "objective": {"name": "dpo"},
        "data": {"train": {"path": pairs_file(3)}, "eval": {"path": pairs_file(1, name="eval.jsonl")}},
        "train": {"learning_rate": 1e-3, "batch_size": 1, "max_steps": 1},
    }
    (stage,) = load_recipe(recipe_file(content)).stages.values()

    def shown() -> str:
        environ = {"TERM": "xterm-256color"}
        file = io.StringIO()
        console = Console(file=file, width=60, force_terminal=True, force_interactive=True, _environ=environ)
        monkeypatch.setattr(rich, "get_console", lambda: console)
        load_stage_data(stage, lambda path: path)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())

    last = {line.split(" ━")[0]: line.split()[-2:] for line in shown().splitlines() if line.strip()}
    assert last == {
        f"{stage.name}: reading train data": ["3/3", "rows"],
        f"{stage.name}: reading eval data": ["1/1", "rows"],
        f"{stage.name}: reading eval prompts": ["1/1", "rows"],
    }
    assert shown() == ""
