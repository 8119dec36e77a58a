"""Processes that a command starts: none of them outlives it, and what they end with is what it ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands import launch
from aligndistil.errors import EXIT_SIGINT, EXIT_SIGKILL, EXIT_SIGTERM, Interrupted

CHILD = """
import os, signal, sys, time
act, rank = sys.argv[1], os.environ.get("RANK", "")
def saved(*_):
    if act == "slow":
        return
    print("saved", flush=True)
    if "ALIGNDISTIL_ERROR_FILE" in os.environ:
        open(os.environ["ALIGNDISTIL_ERROR_FILE"], "w").write("stopped after step 3; a checkpoint is saved")
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, saved)
open(f"ready-{os.getpid()}", "w").close()
if act == "fail" and rank in ("", "1"):
    print("error: no such file", flush=True)
    if rank:
        open(os.environ["ALIGNDISTIL_ERROR_FILE"], "w").write("no such file")
    sys.exit(2)
if act in ("bug", "killed"):
    if rank == "1":
        time.sleep(0.05)
        os.kill(os.getpid(), 9) if act == "killed" else sys.exit(1)
    if act == "bug":
        open(os.environ["ALIGNDISTIL_ERROR_FILE"], "w").write("process 1 of 2 has failed: ValueError")
        sys.exit(1)
if act == "done":
    sys.exit(0)
for _ in range(600):
    time.sleep(0.1)
"""


SENDING: list[threading.Thread] = []
"""Of this test and earlier ones: a signal that comes late would hit the next test."""


@pytest.fixture(autouse=True)
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """In the place of `aligndistil`, what the argument says; gives the ids of the processes that have been ready."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aligndistil.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)  # of an engine that another test made in this process

    def started() -> list[int]:
        return [int(path.name.removeprefix("ready-")) for path in tmp_path.glob("ready-*")]

    yield started
    for thread in SENDING:
        thread.join()
    assert [process for process in started() if Path(f"/proc/{process}").exists()] == []


def signalled(children: Callable[[], list[int]], count: int, *numbers: signal.Signals) -> None:
    """Send this process signals, half a second apart, once so many have been started."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while len(children()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in numbers:
            time.sleep(0.5)
            os.kill(os.getpid(), number)

    SENDING.append(threading.Thread(target=send, daemon=True))
    SENDING[-1].start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_what_was_saved_is_said_once(
    children: Callable[[], list[int]], number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    signalled(children, 2, number)
    assert launch.start(2, ["wait"]) == EXIT_SIGTERM
    out, err = capfd.readouterr()
    assert out.count("saved") == 2
    assert err.count("a checkpoint is saved") == 1
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_while_a_process_is_being_started_reaches_it_too(
    children: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = subprocess.Popen

    def slow(*arguments: Any, **more: Any) -> Any:
        process = start(*arguments, **more)
        if not children():
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr("aligndistil.commands.launch.subprocess.Popen", slow)
    began = time.monotonic()
    assert launch.start(2, ["wait"]) == EXIT_SIGTERM
    assert time.monotonic() - began < 20
    assert "error: stopped; nothing that was learnt is lost" in capfd.readouterr().err


def test_a_step_that_takes_longer_than_it_may_is_killed_and_the_code_is_not_that_of_a_checkpoint(
    children: Callable[[], list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    signalled(children, 2, signal.SIGTERM)
    began = time.monotonic()
    assert launch.start(2, ["slow"], 1.0) == EXIT_SIGKILL
    assert time.monotonic() - began < 15
    assert "did not end within 1 s of the signal and was killed" in " ".join(capfd.readouterr().err.split())


def test_ctrl_c_twice_leaves_at_once(children: Callable[[], list[int]]) -> None:
    signalled(children, 2, signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch.start(2, ["slow"])
    assert time.monotonic() - began < 15


def test_one_that_fails_stops_the_others_and_its_sentence_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.start(3, ["fail"]) == 2
    assert capfd.readouterr().err.count("error: no such file") == 1


def test_all_that_end_well_end_well() -> None:
    assert launch.start(2, ["done"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_SIGTERM), (signal.SIGINT, EXIT_SIGINT)])
def test_trainings_side_by_side_are_stopped_and_no_other_is_started(
    children: Callable[[], list[int]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    signalled(children, 2, number)
    logs = [tmp_path / f"seed-{k}.log" for k in range(3)]
    with pytest.raises(Interrupted, match="the same command goes on") as caught:
        launch.start_side_by_side([["wait"]] * 3, logs, 2, 60)
    assert caught.value.exit_code == code
    assert [log.read_text() for log in logs if log.exists()] == ["saved\n"] * 2


def test_a_training_that_fails_stops_those_beside_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = [tmp_path / f"seed-{k}.log" for k in range(3)]
    assert launch.start_side_by_side([["wait"], ["fail"], ["done"]], logs, 2, 60) == 2
    assert [log.exists() for log in logs] == [True, True, False]
    assert f"error: no such file (see {logs[1]})" in capfd.readouterr().err


def test_a_training_that_takes_too_long_to_stop_is_killed_and_that_is_said(
    children: Callable[[], list[int]], tmp_path: Path
) -> None:
    signalled(children, 1, signal.SIGTERM)
    with pytest.raises(Interrupted, match="seed-0 did not end within 1 s of the signal and was killed") as caught:
        launch.start_side_by_side([["slow"]], [tmp_path / "seed-0.log"], 1, 1.0)
    assert caught.value.exit_code == EXIT_SIGKILL


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [("bug", 1, "process 1 failed first, with exit code 1"), ("killed", 137, "process 1 was ended by signal 9, as")],
)
def test_the_process_that_failed_is_named_though_the_others_end_with_it(
    act: str, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch.start(2, [act]) == code
    assert said in capfd.readouterr().err
