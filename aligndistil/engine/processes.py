"""The process group: one process without a port, or several under torchrun, DeepSpeed, accelerate or srun."""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store

from aligndistil.errors import UserError, of_the_system

TIMEOUT_MINUTES = 60.0
_FAILURE = "aligndistil/failure"
TIMED_OUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)


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

    def agree(self, problem: UserError | None = None) -> None:
        """Raise on all processes what any of them brings: one that refused alone would leave the others waiting."""
        found = [one for one in self.gather(problem) if one is not None]
        if found:
            raise problem or found[0]

    def on_main(self, work: Callable[[], None]) -> None:
        """What only the main process does; all raise the UserError that it raises."""
        problem = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                problem = error
        self.agree(problem)

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
    """Number of processes that a launcher has already started, 1 without a launcher.

    Raises UserError for variables that are no number.
    """
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") or 1


def launched_rank() -> int:
    """Rank that a launcher has given this process, 0 without a launcher."""
    return (_number("RANK", "SLURM_PROCID") or 0) if launched_world() > 1 else 0


def _number(*names: str) -> int | None:
    """The first of these variables that is set."""
    for name in names:
        if text := os.environ.get(name):
            if not text.isdecimal():
                raise UserError(f"the environment variable {name} is {text!r}, and launchers set it to a number")
            return int(text)
    return None


@contextmanager
def process_group(timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Processes]:
    """The processes, which end together: where one fails, the others, which lose it in the middle of an exchange, end
    with what it said.

    Raises that as a UserError, and as `start_processes`.
    """
    processes = start_processes(timeout_minutes)
    try:
        yield processes
    except Exception as error:
        if processes.world > 1:
            own = error if isinstance(error, UserError) else of_the_system(error)
            if own is None and isinstance(error, RuntimeError):  # of a process group, perhaps
                if (failure := _failure_of_another(processes)) is not None:
                    raise failure from None
                _refuse_timeout(error, timeout_minutes)
            _say_to_others(processes, own or error)
        raise
    finally:
        processes.stop()


def _say_to_others(processes: Processes, error: Exception) -> None:
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}; its traceback is in its own output"
    code = error.exit_code if isinstance(error, UserError) else 1
    with suppress(RuntimeError):  # the process that held the store has gone
        _store().set(_FAILURE, json.dumps([processes.rank, what, code]))
    if processes.is_main and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
        time.sleep(2)  # the store is this process's, and the others have to read it


def _failure_of_another(processes: Processes) -> UserError | None:
    try:
        _store().wait([_FAILURE], timedelta(seconds=5))
        rank, what, code = json.loads(_store().get(_FAILURE))
    except RuntimeError:  # nobody failed, or the store has gone with the process that held it
        return None
    error = UserError(f"process {rank} of {processes.world} has failed: {what}")
    error.exit_code = code
    return error


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()


def _refuse_timeout(error: RuntimeError, minutes: float) -> None:
    """Say which setting ran out, where the process group has given up waiting."""
    if TIMED_OUT.search(str(error)):
        raise UserError(
            f"process {launched_rank()} of {launched_world()} waited {minutes:g} minutes for the others: one has ended "
            "or hangs, or needs longer; look at the logs of all processes, or raise engine.timeout_minutes "
            f"({str(error).splitlines()[0]})"
        ) from error


def start_processes(timeout_minutes: float = TIMEOUT_MINUTES) -> Processes:
    """Join the process group, in which a process waits so long for the others.

    Raises UserError when srun's variables lack the address of the first node, or the others do not come.
    """
    world, rank = launched_world(), launched_rank()
    local_rank = _number("LOCAL_RANK", "SLURM_LOCALID") or 0
    os.environ["DEEPSPEED_TIMEOUT"] = str(math.ceil(timeout_minutes))  # of the groups that DeepSpeed makes
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
            timeout = timedelta(minutes=timeout_minutes)
            try:
                dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
            except RuntimeError as error:
                _refuse_timeout(error, timeout_minutes)
                raise
    return Processes(rank, world, device)
