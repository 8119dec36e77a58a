"""Starting a command in several processes: those of one training, or a training for each seed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rich
from rich.console import Console
from rich.markup import escape

from aligndistil.errors import EXIT_SIGINT, EXIT_SIGTERM, EXIT_USAGE, Interrupted, UserError, printable

_OURS = "ALIGNDISTIL_LAUNCHED"
"""Set in processes that `start` started: the parent prints what went wrong, once."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def process_count(processes: str) -> int:
    """`--processes`: a number, or `auto` for one per GPU (one on a machine without)."""
    if processes == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not processes.isdecimal() or int(processes) < 1:
        raise UserError(f"--processes {processes}: give a number of processes from 1, or auto")
    return int(processes)


def must_start(processes: str) -> bool:
    """Whether processes have to be started: not when a launcher has done so already.

    Raises UserError when `--processes` contradicts that launcher.
    """
    from aligndistil.engine.processes import launched_world

    world = launched_world()
    count = process_count(processes)
    if world > 1 and count not in (1, world) and os.environ.get(_OURS) is None:
        raise UserError(f"--processes {count}: a launcher has already started {world}; leave --processes out")
    return world == 1 and count > 1


def start(count: int, arguments: list[str]) -> int:
    """Run this command in `count` processes on this machine; returns the exit code of the first that failed.

    Each process's own traceback goes to stderr as it happens; a user's mistake is printed here, once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_OURS] = "1"
    # As torchrun does: one thread each unless the user says otherwise, since they share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"aligndistil-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "aligndistil", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code >= EXIT_USAGE and os.path.exists(failure.error_file):
            sentence = json.loads(Path(failure.error_file).read_text())["message"]
            _complain(sentence)
        else:
            _complain(f"process {rank} failed first, with exit code {code}; its traceback stands above")
        return int(code)
    except SignalException as error:
        return EXIT_SIGINT if error.sigval.name == "SIGINT" else EXIT_SIGTERM
    return 0


def start_side_by_side(commands: list[list[str]], logs: list[Path], jobs: int) -> int:
    """Run `aligndistil COMMAND` for each, so many at a time, each writing to its log; the exit code of what failed.

    When one fails, those that run are stopped with a checkpoint and no further one is started.
    """
    # They share the cores: with a thread for every core each, they would wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    waiting, running, code = list(zip(commands, logs, strict=True)), dict[Path, subprocess.Popen[bytes]](), 0
    with _stopping_with_this_process(running):
        while running or (waiting and not code):
            while waiting and not code and len(running) < jobs:
                command, log = waiting.pop(0)
                running[log] = _started(command, log, environment)
            time.sleep(0.2)
            for log in [log for log, process in running.items() if process.poll() is not None]:
                ended = running.pop(log).returncode
                if ended and not code:
                    code = ended if ended > 0 else 128 - ended
                    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    _complain(f"{lines[-1].removeprefix('error: ')} (see {log})" if lines else f"see {log}")
                    _stop(running.values())
                elif not ended:
                    rich.print(f"[green]✓[/] [bold]{log.stem}[/]")
    return code


def _started(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    rich.print(f"[cyan]▶[/] [bold]{log.stem}[/]: {escape(str(log))}")
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "aligndistil", *command], env=environment, stdout=stream, stderr=subprocess.STDOUT
        )


@contextmanager
def _stopping_with_this_process(running: dict[Path, subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM stop the processes that run, with their checkpoints, before they stop this one."""

    def terminated(*_: object) -> None:
        raise Interrupted("stopped; the same command goes on where the seeds were")

    previous = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        _stop(running.values())
        for process in running.values():
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)


def report_error(error: UserError) -> None:
    """Say what went wrong: print it, or leave it to the parent process that started this one."""
    if os.environ.get(_OURS) and (file := os.environ.get(_ERROR_FILE)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps({"message": str(error)}))
    elif os.environ.get("RANK", "0") == "0":
        _complain(str(error))


def _complain(sentence: str) -> None:
    # Unwrapped: a sentence with a path in it should survive copying, and grep.
    Console(stderr=True).print(f"[bold red]error:[/] {escape(printable(sentence))}", soft_wrap=True)
