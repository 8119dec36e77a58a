"""The process group: one process without a port, or several under torchrun, DeepSpeed, accelerate or srun."""

from __future__ import annotations

import atexit
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from aligndistil.errors import UserError


@dataclass(frozen=True, slots=True)
class Processes:
    """The rank of this process, and what it exchanges with the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The Python objects of all processes, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the process group; a process that is alone keeps its own for the next run.

        DeepSpeed remembers groups that it has made, and cannot be started again once they are gone.
        """
        if self.world > 1:
            _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def launched_world() -> int:
    """Number of processes that a launcher has already started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def launched_rank() -> int:
    """Rank that a launcher has given this process, 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) if launched_world() > 1 else 0


def start_processes() -> Processes:
    """Join the process group. Raises UserError when srun's variables lack the address of the first node."""
    world, rank = launched_world(), launched_rank()
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    # DeepSpeed reads these names itself, whoever launched us.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if world == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            atexit.register(_leave)
        else:
            if not os.environ.get("MASTER_ADDR"):
                raise UserError(
                    f"{world} processes were started without MASTER_ADDR (on {socket.gethostname()}); "
                    "set MASTER_ADDR and MASTER_PORT to the first node, or start them with torchrun"
                )
            dist.init_process_group(backend, rank=rank, world_size=world)
    return Processes(rank, world, device)
