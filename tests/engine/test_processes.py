"""Who a process is, whatever started it. What several compute together is in test_two_processes.py."""

from __future__ import annotations

import pytest
import torch

from aligndistil.engine.processes import Processes, launched_rank, launched_world, start_processes
from aligndistil.errors import UserError

LAUNCHER = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
SLURM = ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHER, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_a_process_is_alone(bare: pytest.MonkeyPatch) -> None:
    assert (launched_world(), launched_rank()) == (1, 0)
    alone = start_processes()
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    value = torch.tensor([3.0])
    assert alone.sum(value) is value
    assert alone.max(value) is value
    assert alone.gather("x") == ["x"]
    alone.barrier()
    alone.stop()


def test_a_process_that_is_alone_may_stop_and_start_again(bare: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        start_processes().stop()


@pytest.mark.parametrize(
    ("variables", "world", "rank"),
    [
        ({"WORLD_SIZE": "4", "RANK": "3"}, 4, 3),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 8, 5),
        ({"WORLD_SIZE": "2", "RANK": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 2, 1),
        # A batch script of sbatch or a shell of salloc has an allocation, and has not been started by srun.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, 0),
        ({"SLURM_PROCID": "0"}, 1, 0),
    ],
)
def test_torchrun_and_srun_say_who_a_process_is(
    variables: dict[str, str], world: int, rank: int, bare: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    assert (launched_world(), launched_rank()) == (world, rank)


def test_several_processes_need_the_address_of_the_first(bare: pytest.MonkeyPatch) -> None:
    bare.setattr("torch.distributed.is_initialized", lambda: False)
    bare.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"2 processes were started without MASTER_ADDR .*; set MASTER_ADDR"):
        start_processes()


def test_only_rank_0_is_the_main_process() -> None:
    assert [Processes(rank, 3, torch.device("cpu")).is_main for rank in range(3)] == [True, False, False]
