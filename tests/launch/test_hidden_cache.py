"""`engine.teacher_cache`: a stage that reads its teachers from disk trains as one that runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.artefacts import StageFolder
from aligndistil.data import cache_root
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.launch import StageLaunch
from aligndistil.recipe import load_recipe

ModelFolder = Callable[..., str]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def losses(
    recipe_file: Callable[..., Path], pairs_file: Callable[..., str], model_folder: ModelFolder, processes: Processes
) -> Callable[..., list[float]]:
    """Training losses of an off-policy stage with two frozen teachers."""
    data = pairs_file(6)

    def train(name: str, **changes: Any) -> list[float]:
        content = {
            "model": {"path": model_folder(seed=0), "dtype": "float32"},
            "models": {"teacher": model_folder(seed=1), "reverse_teacher": model_folder(seed=2)},
            "objective": {"name": "aligndistil", "r": 5},
            "data": {"train": {"path": data}, "eval": {"path": data}},
            "train": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 3},
            "engine": {"zero_stage": 0, **changes},
        }
        (stage,) = load_recipe(recipe_file(content)).stages.values()
        folder = StageFolder(Path(name))
        StageLaunch(stage, folder, lambda path: path, processes).run(lambda: False)
        return [line["loss"] for line in folder.metrics.read()]

    return train


def test_a_cached_stage_learns_what_an_uncached_one_learns(
    losses: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = losses("plain")
    cached = losses("cached", teacher_cache=True)
    assert cached == pytest.approx(plain, rel=1e-5)
    assert capsys.readouterr().out.count("teacher cache of") == 2
    assert len(list((cache_root() / "hidden").glob("*/about.json"))) == 2


def test_a_second_stage_runs_no_teacher(losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    first = losses("first", teacher_cache=True)

    def never(*_: object) -> None:
        raise AssertionError("a teacher was run")

    monkeypatch.setattr(FrozenModel, "read", never)
    assert losses("second", teacher_cache=True) == first


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (
            {"objective": {"name": "aligndistil"}, "rollout": {"max_new_tokens": 4}},
            "the responses of this stage are sampled while it trains; remove the line",
        ),
        ({"objective": {"name": "sft"}}, "`sft` reads no frozen model on the rows of the data alone; remove the line"),
        ({"objective": {"name": "kto"}}, "`kto` reads no frozen model on the rows of the data alone; remove the line"),
    ],
)
def test_a_stage_that_cannot_use_it_refuses_it(
    stage: dict[str, Any], sentence: str, recipe_file: Callable[..., Path]
) -> None:
    names = {"aligndistil": ("teacher", "reverse_teacher"), "kto": ("reference",), "sft": ()}
    models = dict.fromkeys(names[stage["objective"]["name"]], "builtin:tiny")
    content = {
        "model": {"path": "builtin:tiny"},
        "data": {"train": {"path": "builtin:reviews"}},
        "stages": {"s": {**stage, **({"models": models} if models else {}), "engine": {"teacher_cache": True}}},
    }
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(content))
    assert f"stages.s.engine.teacher_cache: {sentence}" in str(caught.value)
