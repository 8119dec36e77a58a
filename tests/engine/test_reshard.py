"""A checkpoint is continued by any number of processes at any ZeRO stage: same numbers, same training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.engine.checkpoint import load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.engine.reshard import MOMENTS, WEIGHT, SavedStates, trained_parameters
from support.engines import CONSTANT, GOALS, make_engine, models_of, objective, steps_of, take_step

STAGES = range(4)
PAIRS = [(0, 2), (1, 0), (2, 3), (3, 1), (3, 3)]
TRAIN = {**CONSTANT, "lr_scheduler": "linear", "weight_decay": 0.1, "batch_size": 4, "micro_batch_size": 1}
Steps = list[tuple[float, float]]


def engine(models: Any, processes: Processes, stage: int, dtype: str = "float32") -> Engine:
    goal = objective("dpo", **GOALS["dpo"])
    return make_engine(goal, *models, processes, train=TRAIN, engine={"zero_stage": stage}, model={"dtype": dtype})


def write(models: Any, processes: Processes, folder: Path, stage: int, dtype: str = "float32") -> Steps:
    """A checkpoint after two of four steps; loss and norm of the other two."""
    made = engine(models, processes, stage, dtype)
    for some in steps_of("dpo")[:2]:
        take_step(made, some, 1)
    save_checkpoint(made, folder, {"step": 2}, keep=1)
    rest = [take_step(made, some, 1)[:2] for some in steps_of("dpo")[2:]]
    made.close()
    return rest


def resume(models: Any, processes: Processes, path: Path, stage: int, again: Path, dtype: str = "float32") -> Steps:
    """The other two steps at this stage; the checkpoint is saved anew, as it was loaded, in `again`."""
    made = engine(models, processes, stage, dtype)
    assert load_checkpoint(made, path) == {"step": 2}
    save_checkpoint(made, again, {"step": 2}, keep=1)
    rest = [take_step(made, some, 1)[:2] for some in steps_of("dpo")[2:]]
    made.close()
    return rest


def states(names: dict[str, int], path: Path, stage: int) -> dict[str, torch.Tensor]:
    def read(file: str) -> Any:
        return torch.load(file, weights_only=False)

    saved = SavedStates(path / "policy", stage, names, read)
    found = {f"{name} {key}": saved.get(name, key, n) for name, n in names.items() for key in (WEIGHT, *MOMENTS)}
    return {**found, "step": saved.step, "rates": torch.tensor(saved.lr_scheduler["_last_lr"])}


def one_process(models: Any, folder: str) -> dict[str, Any]:
    processes = start_processes()
    made = engine(models, processes, 0)
    names = {name: p.numel() for name, p in trained_parameters(made.deepspeed["policy"]).items()}
    made.close()
    return {"straight": [write(models, processes, Path(folder) / f"one-{s}", s) for s in STAGES], "names": names}


def two_processes(models: Any, folder: str) -> dict[str, Any]:
    processes, place = start_processes(), Path(folder)
    answers: dict[str, Any] = {"straight": [write(models, processes, place / f"two-{s}", s) for s in STAGES]}
    for before, after in PAIRS:
        path, again = place / f"one-{before}" / "checkpoint-2", place / f"one-{before}-two-{after}"
        answers[f"{before} {after}"] = resume(models, processes, path, after, again)
    return answers


@pytest.fixture(scope="module")
def models(model_folder: Callable[..., str]) -> Any:
    return models_of("dpo", model_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(models: Any, folder: Path, on_processes: Callable[..., list[Any]]) -> dict[str, Any]:
    answers: dict[str, Any] = on_processes(one_process, models, str(folder), world=1)[0]
    return answers


@pytest.fixture(scope="module")
def names(one: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = one["names"]
    return found


@pytest.fixture(scope="module")
def two(models: Any, folder: Path, one: Any, on_processes: Callable[..., list[Any]]) -> dict[str, Any]:
    answers: dict[str, Any] = on_processes(two_processes, models, str(folder), timeout=240)[0]
    return answers


def same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=rtol)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("after", STAGES)
@pytest.mark.parametrize("before", STAGES)
def test_another_zero_stage(
    before: int, after: int, models: Any, names: Any, processes: Processes, folder: Path, one: Any, tmp_path: Path
) -> None:
    path = folder / f"one-{before}" / "checkpoint-2"
    same(resume(models, processes, path, after, tmp_path), one["straight"][before])
    assert_equal(states(names, tmp_path / "checkpoint-2", after), states(names, path, before))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_one_process_continues_what_two_began(
    before: int, after: int, models: Any, names: Any, processes: Processes, folder: Path, two: Any, tmp_path: Path
) -> None:
    path = folder / f"two-{before}" / "checkpoint-2"
    same(resume(models, processes, path, after, tmp_path), two["straight"][before])
    assert_equal(states(names, tmp_path / "checkpoint-2", after), states(names, path, before))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_two_processes_continue_what_one_began(
    before: int, after: int, names: Any, folder: Path, one: Any, two: dict[str, Any]
) -> None:
    same(two[f"{before} {after}"], one["straight"][before])
    again = folder / f"one-{before}-two-{after}" / "checkpoint-2"
    assert_equal(states(names, again, after), states(names, folder / f"one-{before}" / "checkpoint-2", before))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 3), (2, 1), (3, 1), (3, 2)])
def test_the_float32_weights_behind_bfloat16_are_the_same(
    before: int, after: int, models: Any, names: Any, processes: Processes, tmp_path: Path
) -> None:
    rest = write(models, processes, tmp_path / "a", before, "bfloat16")
    path = tmp_path / "a" / "checkpoint-2"
    same(resume(models, processes, path, after, tmp_path / "b", "bfloat16"), rest, rtol=1e-2)
    assert_equal(states(names, tmp_path / "b" / "checkpoint-2", after), states(names, path, max(before, 1)))


def test_a_checkpoint_with_fewer_elements_than_the_model_is_an_error(
    names: dict[str, int], folder: Path, one: Any
) -> None:
    saved = SavedStates(folder / "one-0" / "checkpoint-2" / "policy", 0, names, torch.load)
    name = next(iter(names))
    with pytest.raises(RuntimeError, match=f"the checkpoint has {names[name]} elements of {name}"):
        saved.get(name, WEIGHT, names[name] + 1)
