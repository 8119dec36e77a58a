"""A checkpoint is there whole or not at all, and training goes on from it bit for bit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.files import partial_path
from support.engines import make_engine, models_of, objective, steps_of, take_step
from support.step_batches import case_of, folders_of
from support.step_batches import engine_of as rounds_engine

ModelFolder = Callable[..., str]
TRAIN = {"learning_rate": 1e-3, "warmup_ratio": 0.5, "batch_size": 4, "micro_batch_size": 2, "weight_decay": 0.1}


def engine_of(folder: ModelFolder, processes: Processes, stage: int, dtype: str = "float32") -> Engine:
    policy, frozen = models_of("dpo", folder)
    return make_engine(
        objective("dpo", beta=0.5),
        policy,
        frozen,
        processes,
        train=TRAIN,
        engine={"zero_stage": stage},
        model={"dtype": dtype},
        steps=6,
    )


@pytest.fixture
def engine(model_folder: ModelFolder, processes: Processes) -> Iterator[Engine]:
    made = engine_of(model_folder, processes, 0)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(
    stage: int, dtype: str, model_folder: ModelFolder, processes: Processes, tmp_path: Path
) -> None:
    steps = steps_of("dpo", 6)
    straight = engine_of(model_folder, processes, stage, dtype)
    for some in steps[:3]:
        take_step(straight, some, 2)
    path = save_checkpoint(straight, tmp_path, {"step": 3, "mine": [0.1, 1e-300]}, keep=1)
    expected = [take_step(straight, some, 2) for some in steps[3:]]
    weights = straight.state_dict()
    straight.close()
    resumed = engine_of(model_folder, processes, stage, dtype)
    assert load_checkpoint(resumed, path) == {"step": 3, "mine": [0.1, 1e-300]}
    assert [take_step(resumed, some, 2) for some in steps[3:]] == expected
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, weights[name]), name
    resumed.close()


def test_every_random_generator_goes_on_where_it_was(engine: Engine, tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    draw()
    path = save_checkpoint(engine, tmp_path, {"step": 1}, keep=1)
    expected = draw()
    draw()
    load_checkpoint(engine, path)
    assert draw() == expected


def test_the_oldest_is_removed_when_the_newest_is_complete(engine: Engine, tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(engine, tmp_path, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_half_written_checkpoint_is_ignored_and_cleared_away(engine: Engine, tmp_path: Path) -> None:
    good = save_checkpoint(engine, tmp_path, {"step": 1}, keep=5)
    half = partial_path(tmp_path / "checkpoint-2")
    shutil.copytree(good, half)
    shutil.copytree(good, tmp_path / "checkpoint-2.tmp")  # as earlier versions left it
    # As a file system without atomic renames may leave it: the record is written last.
    shutil.copytree(good, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "checkpoint.json").unlink()
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoints(tmp_path) == [good]
    save_checkpoint(engine, tmp_path, {"step": 4}, keep=5)
    assert not half.exists()
    assert not (tmp_path / "checkpoint-2.tmp").exists()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_a_step_may_be_saved_again(engine: Engine, tmp_path: Path) -> None:
    save_checkpoint(engine, tmp_path, {"step": 1, "attempt": 1}, keep=1)
    path = save_checkpoint(engine, tmp_path, {"step": 1, "attempt": 2}, keep=1)
    assert load_checkpoint(engine, path)["attempt"] == 2


def test_a_checkpoint_holds_the_critic_and_is_refused_without_it(
    model_folder: ModelFolder, processes: Processes, tmp_path: Path
) -> None:
    """As a version that trained no critic would have left it."""
    engine = rounds_engine(case_of("ppo", folders_of(model_folder)), processes, 0)
    path = save_checkpoint(engine, tmp_path, {"step": 1}, keep=1)
    with torch.no_grad():
        head = engine.deepspeed["critic"].module.head.weight
        before = head.clone()
        head.zero_()
    load_checkpoint(engine, path)
    assert torch.equal(engine.deepspeed["critic"].module.head.weight, before)
    shutil.rmtree(path / "critic")
    with pytest.raises(UserError, match=r"checkpoint-1 has no state of the critic: .*; start over with --fresh"):
        load_checkpoint(engine, path)
    engine.close()


@pytest.mark.gpu
def test_the_gpu_s_random_numbers_go_on_too(engine: Engine, tmp_path: Path) -> None:
    path = save_checkpoint(engine, tmp_path, {"step": 1}, keep=1)
    expected = float(torch.rand((), device="cuda"))
    load_checkpoint(engine, path)
    assert float(torch.rand((), device="cuda")) == expected
