"""Signals that ask to stop: at once, or when what runs is done and saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from aligndistil.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted
from aligndistil.stop import ASKS, PARENT, StopSignal, interrupted


@pytest.mark.parametrize("number", ASKS)
def test_a_request_is_noted_and_the_old_handlers_come_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before, stop = signal.getsignal(number), StopSignal()
    with stop.deferred():
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before
    assert stop.exit_code == EXIT_SIGTERM
    assert capfd.readouterr().err.count("the step that runs is finished and saved first") == 1


def test_ctrl_c_asks_once_and_leaves_the_second_time(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopSignal()
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.exit_code == EXIT_SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C now leaves at once" in capfd.readouterr().err


def test_a_request_is_noted_where_the_terminal_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    stop = StopSignal()
    monkeypatch.setattr("aligndistil.stop.os.write", gone)
    with stop.deferred():
        signal.raise_signal(signal.SIGHUP)
    assert stop.requested


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As `nohup` asks for."""
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopSignal()
    try:
        with stop.deferred(), interrupted("stopped"):
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ASKS)
def test_where_nothing_is_to_be_saved_a_request_ends_what_runs_whoever_catches_exceptions(
    number: signal.Signals,
) -> None:
    def careless() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except Exception:
            pytest.fail("swallowed")

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="run it again") as caught, interrupted("run it again"):
        careless()
    assert caught.value.exit_code == EXIT_SIGTERM
    assert signal.getsignal(number) is before


PARENT_AND_CHILD = """
import os, subprocess, sys, time
from aligndistil.stop import PARENT
child = "import time; from aligndistil.stop import end_with_parent as e; e(); print('here', flush=True); time.sleep(60)"
environment = {**os.environ, PARENT: str(os.getpid())}
running = subprocess.Popen([sys.executable, "-c", child], env=environment, stdout=subprocess.PIPE)
running.stdout.readline()
print(running.pid, flush=True)
time.sleep(60)
"""


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent-death signal is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends_with_the_one_that_started_it(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT_AND_CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(number)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_process_whose_parent_has_ended_already_does_not_begin() -> None:
    code = "from aligndistil.stop import end_with_parent; end_with_parent()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, PARENT: "1"}, capture_output=True, text=True)
    assert "Interrupted" in done.stderr
