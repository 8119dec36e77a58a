"""Trainings side by side: none of them outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aligndistil.commands import launch as launcher
from aligndistil.errors import EXIT_SIGTERM, Interrupted

TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(60)
"""


def test_sigterm_stops_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", TRAINING], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started.append(process)
        return process

    monkeypatch.setattr(launcher, "_started", start)
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Interrupted, match="the same command goes on") as caught:
        launcher.start_side_by_side([["a"], ["b"], ["c"]], [tmp_path / f"seed-{k}.log" for k in range(3)], 2)
    assert caught.value.exit_code == EXIT_SIGTERM
    assert [process.poll() for process in started] == [EXIT_SIGTERM, EXIT_SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
