"""`engine.teacher_cache`: a stage that reads its teachers from disk trains as one that runs them."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aligndistil.engine.engine import Engine
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.engine.teacher_cache import is_whole
from aligndistil.errors import UserError
from aligndistil.files import cache_root
from aligndistil.models import load_model
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import StageFolder
from aligndistil.stop import StopSignal
from aligndistil.training import StageTraining
from aligndistil.training import teacher_cache as hidden_cache

ModelFolder = Callable[..., str]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def content_of(models: dict[str, str], data: str, model: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """An off-policy stage with two frozen teachers."""
    return {
        "model": {"path": models["policy"], "dtype": "float32", **model},
        "models": {"teacher": models["teacher"], "reverse_teacher": models["reverse_teacher"]},
        "objective": {"name": "aligndistil", "r": 5},
        "data": {"train": {"path": data}, "eval": {"path": data}},
        "train": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 3},
        "engine": {"zero_stage": 0, **engine},
    }


def losses_of(recipe: Path, folder: Path, processes: Processes) -> list[float]:
    (stage,) = load_recipe(recipe).stages.values()
    StageTraining(stage, StageFolder(folder), lambda path: path, processes).run(StopSignal())
    return [line["loss"] for line in StageFolder(folder).metrics.read()]


@pytest.fixture
def models(model_folder: ModelFolder) -> dict[str, str]:
    return {role: model_folder(seed=seed) for seed, role in enumerate(("policy", "teacher", "reverse_teacher"))}


@pytest.fixture
def losses(
    recipe_file: Callable[..., Path], pairs_file: Callable[..., str], models: dict[str, str], processes: Processes
) -> Callable[..., list[float]]:
    """Training losses of the stage."""
    data = pairs_file(6)

    def train(name: str, model: dict[str, Any] | None = None, **engine: Any) -> list[float]:
        return losses_of(recipe_file(content_of(models, data, model or {}, engine)), Path(name), processes)

    return train


def caches() -> list[Path]:
    return [path.parent for path in (cache_root() / "hidden").glob("*/checksum")]


def test_a_cached_stage_learns_what_an_uncached_one_learns(
    losses: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = losses("plain")
    cached = losses("cached", teacher_cache=True)
    assert cached == pytest.approx(plain, rel=1e-5)
    said = capsys.readouterr().out
    assert said.count("teacher cache of") == 2
    for role in ("teacher", "reverse teacher"):
        assert said.count(f": caching {role}: 6/6 rows, ") == 1
    assert len(caches()) == 2


def test_a_second_stage_runs_no_teacher(losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    first = losses("first", teacher_cache=True)

    def never(*_: object) -> None:
        raise AssertionError("a teacher was run")

    monkeypatch.setattr(FrozenModel, "read", never)
    assert losses("second", teacher_cache=True) == first


def test_of_a_cached_teacher_only_the_head_is_kept(
    losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, alive = list[weakref.ref[Any]](), list[bool]()

    def load(*args: Any, **settings: Any) -> Any:
        model = load_model(*args, **settings)
        loaded.append(weakref.ref(model))
        return model

    def build(*args: Any, **settings: Any) -> Engine:
        gc.collect()
        alive.extend(model() is not None for model in loaded)
        return Engine(*args, **settings)

    monkeypatch.setattr("aligndistil.models.bases.load_model", load)
    monkeypatch.setattr("aligndistil.training.models.Engine", build)
    losses("cached", teacher_cache=True)
    assert alive == [True, False, False]


def test_another_attention_has_a_cache_of_its_own(losses: Callable[..., list[float]]) -> None:
    losses("first", teacher_cache=True)
    losses("second", {"attn_implementation": "eager"}, teacher_cache=True)
    assert len(caches()) == 4


@pytest.mark.parametrize(
    "harm",
    [lambda content: bytes(len(content)), lambda content: content[: len(content) // 2], lambda content: None],
    ids=["zeros", "cut", "missing"],
)
def test_a_damaged_cache_is_said_and_made_again(
    harm: Callable[[bytes], bytes | None],
    losses: Callable[..., list[float]],
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = losses("first", teacher_cache=True)
    (damaged, part), (_, other) = [(folder, *folder.glob("*.safetensors")) for folder in caches()]
    contents = [part.read_bytes(), other.read_bytes()]
    harmed = harm(contents[0])
    part.unlink() if harmed is None else part.write_bytes(harmed)
    capsys.readouterr()
    assert losses("second", teacher_cache=True) == first
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert any(f"the teacher cache of {models[role]} is damaged and made again" in line for role in models)
    assert f"{damaged} is not as it was written" in line
    assert [part.read_bytes(), other.read_bytes()] == contents
    assert losses("third", teacher_cache=True) == first
    assert "teacher cache of" not in capsys.readouterr().out


def test_a_disk_without_room_is_refused_before_a_teacher_is_run(
    losses: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"hidden has 0\.0 GiB left and the hidden states need .* set HF_HOME"):
        losses("first", teacher_cache=True)
    assert caches() == []


def test_a_teacher_that_is_not_finite_is_named(
    losses: Callable[..., list[float]], models: dict[str, str], model_folder: ModelFolder, tmp_path: Path
) -> None:
    models["teacher"] = str(shutil.copytree(model_folder(seed=1, tied=False), tmp_path / "broken"))
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["model.embed_tokens.weight"][4] = float("nan")  # in every prompt, and not in what a model is checked on
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the hidden states of .*/broken are not all finite"):
        losses("first", teacher_cache=True)
    left = [path.name for path in (cache_root() / "hidden").iterdir() if path.is_dir()]
    assert left == [folder.name for folder in caches()]


def on_two(recipe: str, folder: str, home: str) -> dict[str, Any]:
    os.environ["HF_HOME"] = home
    processes, read = start_processes(), list[str]()

    def watched(folder: Path) -> bool:
        read.append(folder.name)
        return is_whole(folder)

    hidden_cache.is_whole = watched
    first = losses_of(Path(recipe), Path(folder) / "first", processes)
    processes.barrier()
    if processes.is_main:
        for part in (cache_root() / "hidden").glob("*/00001-*.safetensors"):
            part.write_bytes(bytes(part.stat().st_size))
    processes.barrier()
    second = losses_of(Path(recipe), Path(folder) / "second", processes)
    third = losses_of(Path(recipe), Path(folder) / "third", processes)
    processes.stop()
    return {"same": first == second == third, "read": len(read)}


def test_of_two_processes_one_checks_and_both_make_it_again(
    models: dict[str, str],
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    on_processes: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    recipe = recipe_file(content_of(models, pairs_file(6), {}, {"teacher_cache": True}))
    answers = on_processes(on_two, str(recipe), str(tmp_path), str(tmp_path / "home"))
    # Two teachers, in three stages.
    assert answers == [{"same": True, "read": 6}, {"same": True, "read": 0}]


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
