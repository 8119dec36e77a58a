"""Starting a command in several processes: those of one training, or a training for each seed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import rich
from rich.console import Console

from aligndistil.errors import EXIT_SIGINT, EXIT_SIGKILL, EXIT_SIGTERM, EXIT_USAGE, Interrupted, UserError, for_console
from aligndistil.stop import ASKS, PARENT, handled

if TYPE_CHECKING:
    from aligndistil.recipe import Recipe

_ERROR_FILE = "ALIGNDISTIL_ERROR_FILE"
"""Set in processes that `start` started: the parent prints what went wrong, once."""
_ONE_THREAD = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
"""They share the cores: with a thread for every core each, they would wait for each other."""
STOP_TIMEOUT = 600.0
"""Seconds that processes have to end the step they are in."""
AFTER_A_FAILURE = 30.0
"""The same where one has failed, and the others may wait for it for ever."""


def process_count(processes: str) -> int:
    """`--processes`: a number, or `auto` for one per GPU (one on a machine without)."""
    if processes == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not processes.isdecimal() or int(processes) < 1:
        raise UserError(f"--processes {processes}: give a number of processes from 1, or auto")
    return int(processes)


def stop_timeout_of(recipe: Recipe) -> float:
    """Seconds that processes which train this recipe have to end the step they are in."""
    return max(stage.engine.stop_timeout for stage in recipe.stages.values())


def must_start(processes: str) -> bool:
    """Whether processes have to be started: not when a launcher has done so already.

    Raises UserError when `--processes` contradicts that launcher.
    """
    from aligndistil.engine.processes import launched_world

    world = launched_world()
    count = process_count(processes)
    if world > 1 and count not in (1, world) and _ERROR_FILE not in os.environ:
        raise UserError(f"--processes {count}: a launcher has already started {world}; leave --processes out")
    return world == 1 and count > 1


def start(count: int, arguments: list[str], stop_timeout: float = STOP_TIMEOUT) -> int:
    """Run this command in `count` processes on this machine; returns the exit code of the first that failed.

    Each process's own traceback goes to stderr as it happens; a user's mistake is printed here, once. A signal that
    asks to stop is passed on, and what has not ended `stop_timeout` seconds later is killed.
    """
    from torch._C._distributed_c10d import TCPStore

    # The processes meet at a port that is open already: one that was only looked up may be another's by then.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **_ONE_THREAD}
    with tempfile.TemporaryDirectory() as folder, Children(stop_timeout) as children:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _ERROR_FILE: f"{folder}/process {rank}"}
            children.start(f"process {rank}", arguments, {**shared, **own})
        failed: list[tuple[str, int]] = []
        while children.running:
            ended = [(name, code) for name, code in children.ended() if code]
            failed = failed or ended
            if failed and not children.stopping:
                children.stop(AFTER_A_FAILURE)
        if children.killed and children.signal is not None:
            _complain(_killed(children.killed, stop_timeout))
            return EXIT_SIGKILL
        if not failed:
            return 0
        # One that only says what another has failed of has a file, and that one's traceback has none.
        by_itself = children.signal is None
        name, code = min(failed, key=lambda one: (Path(folder) / one[0]).exists() == by_itself)
        file = Path(folder) / name
        if code >= EXIT_USAGE and file.exists():
            _complain(file.read_text(encoding="utf-8"))
        elif children.signal is not None:  # it had not begun
            _complain("stopped; nothing that was learnt is lost: run the same command to go on")
        elif code > 128:
            _complain(f"{name} was ended by signal {code - 128}, as by the system where memory runs out")
        else:
            _complain(f"{name} failed first, with exit code {code}; its traceback stands above")
        return code


def start_side_by_side(commands: list[list[str]], logs: list[Path], jobs: int, stop_timeout: float) -> int:
    """Run `aligndistil COMMAND` for each, so many at a time, each writing to its log; the exit code of what failed.

    When one fails, or a signal asks to stop, those that run are stopped with a checkpoint and no further one is
    started. Raises Interrupted, once they have ended, after such a signal.
    """
    waiting, code = dict(zip(logs, commands, strict=True)), 0
    with Children(stop_timeout) as children:
        while children.running or (waiting and not children.stopping):
            while waiting and not children.stopping and len(children.running) < jobs:
                log, command = next(iter(waiting.items()))
                del waiting[log]
                log.parent.mkdir(parents=True, exist_ok=True)
                rich.print(f"[cyan]▶[/] [bold]{log.stem}[/]: {for_console(log)}")
                children.start(log.stem, command, _ONE_THREAD, log)
            for name, ended in children.ended():
                if not ended:
                    rich.print(f"[green]✓[/] [bold]{name}[/]")
                elif not code and children.signal is None:
                    code, log = ended, next(log for log in logs if log.stem == name)
                    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    _complain(f"{lines[-1].removeprefix('error: ')} (see {log})" if lines else f"see {log}")
                    children.stop(stop_timeout)
        if children.signal is not None and children.killed:
            raise Interrupted(_killed(children.killed, stop_timeout), EXIT_SIGKILL)
        if children.signal is not None:
            by_hand = children.signal == signal.SIGINT
            raise Interrupted(
                "stopped; the same command goes on where the seeds were", EXIT_SIGINT if by_hand else EXIT_SIGTERM
            )
    return code


def _killed(names: Sequence[str], stop_timeout: float) -> str:
    return (
        f"{', '.join(names)} did not end within {stop_timeout:g} s of the signal and was killed, so that what came "
        "after the last checkpoint is lost; raise engine.stop_timeout above the time of a step"
    )


class Children:
    """Processes of `aligndistil` that end with this one.

    While it is entered, a signal that asks to stop is passed on to them; a second Ctrl-C kills them.
    """

    def __init__(self, stop_timeout: float) -> None:
        self._stop_timeout = stop_timeout
        self._deadline = math.inf
        self._handled = ExitStack()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.signal: int | None = None
        """The first that asked to stop."""
        self.killed: list[str] = []

    def __enter__(self) -> Children:
        self._handled.enter_context(handled(dict.fromkeys((*ASKS, signal.SIGINT), self._pass_on)))
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._handled.close()

    @property
    def stopping(self) -> bool:
        return self._deadline < math.inf

    def start(self, name: str, arguments: list[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        """Start a process; what it prints goes to the log, if there is one."""
        with log.open("wb") if log else nullcontext() as stream:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "aligndistil", *arguments],
                env={**os.environ, PARENT: str(os.getpid()), **environment},
                stdout=stream,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )
        if self.signal is not None:  # it came before this one was there to be told
            self.running[name].send_signal(signal.SIGTERM)

    def ended(self) -> list[tuple[str, int]]:
        """The names and exit codes of those that have ended since; waits a little."""
        time.sleep(0.1)
        if time.monotonic() > self._deadline:
            self.killed += self.running
            self._kill()
        codes = {name: process.poll() for name, process in self.running.items()}
        ended = {name: code for name, code in codes.items() if code is not None}
        self.running = {name: process for name, process in self.running.items() if name not in ended}
        return [(name, code if code >= 0 else 128 - code) for name, code in ended.items()]

    def stop(self, seconds: float, number: int = signal.SIGTERM) -> None:
        """Ask all to stop, and kill what has not after so many seconds."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        for process in self.running.values():
            process.send_signal(number)

    def _pass_on(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        self.stop(self._stop_timeout, number)

    def _kill(self) -> None:
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait()


def report_error(error: UserError) -> None:
    """Say what went wrong: print it, or leave it to the parent process that started this one."""
    if file := os.environ.get(_ERROR_FILE):
        Path(file).write_text(str(error), encoding="utf-8")
    elif os.environ.get("RANK", "0") == "0":
        _complain(str(error))


def _complain(sentence: str) -> None:
    # Unwrapped: a sentence with a path in it should survive copying, and grep.
    Console(stderr=True).print(f"[bold red]error:[/] {for_console(sentence)}", soft_wrap=True)
