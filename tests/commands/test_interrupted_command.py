"""The command itself, killed or asked to stop at any moment: what it says, and what the same command ends with."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.engine.checkpoint import checkpoints
from aligndistil.errors import EXIT_SIGTERM
from aligndistil.files import is_partial
from support.recipes import merged, three_stages
from support.run_folders import differences, left_behind, lines

STAGES = ["dpo", "reverse", "policy"]


class Command:
    """`aligndistil train RECIPE --processes N` in a process of its own."""

    def __init__(self, recipe: Path, processes: int, *overrides: str) -> None:
        self._log = recipe.with_suffix(".log")
        settings = [part for one in overrides for part in ("--set", one)]
        command = [sys.executable, "-m", "aligndistil", "train", recipe.name, "--processes", str(processes), *settings]
        with self._log.open("wb") as log:
            self._running = subprocess.Popen(command, cwd=recipe.parent, stdout=log, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self._running.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def begun(self) -> None:
        """Wait until it listens to signals, which Python alone does not."""

        def listens() -> bool:
            status = Path(f"/proc/{self._running.pid}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

        self.until(listens)

    def wait(self, longest: float = 120) -> int:
        return self._running.wait(longest)

    def send(self, number: signal.Signals) -> None:
        self._running.send_signal(number)


def of_run(recipe: Path) -> list[int]:
    """Processes that were started with this recipe, in this folder, and have not ended."""
    found = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            here = Path(f"/proc/{process}/cwd").resolve() == recipe.parent
        except OSError:
            continue
        if here and recipe.name.encode() in words:
            found.append(int(process))
    return found


def nobody_is_left(recipe: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := of_run(recipe):
        assert time.monotonic() < deadline, f"{left} run on"
        time.sleep(0.05)


@pytest.fixture
def recipe(model_folder: Callable[..., str], pairs_file: Callable[..., str], recipe_file: Callable[..., Path]) -> Path:
    content = merged(
        three_stages(model_folder(seed=0), pairs_file(10)),
        {"train": {"max_steps": 8, "micro_batch_size": 1}, "checkpoint": {"every": "auto"}, "logging": {"every": 1}},
    )
    return recipe_file(content)


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "toy"


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_sigterm_while_it_is_still_importing(seconds: float, recipe: Path) -> None:
    command = Command(recipe, 1)
    command.begun()
    time.sleep(seconds)
    command.send(signal.SIGTERM)
    began = time.monotonic()
    assert command.wait() == EXIT_SIGTERM
    assert time.monotonic() - began < 15  # five on a machine that does nothing else
    assert "Traceback" not in command.said


def test_sigterm_in_the_comparison_which_the_same_command_then_writes(recipe: Path) -> None:
    slow = ["report.samples=400", "report.max_new_tokens=400"]
    command = Command(recipe, 1, *slow)
    command.until((folder_of(recipe) / "policy" / "done.json").exists)
    time.sleep(0.5)
    command.send(signal.SIGTERM)
    assert command.wait() == EXIT_SIGTERM
    assert "error: stopped; nothing that was learnt is lost: run the same command to go on" in command.said
    command = Command(recipe, 1)
    assert command.wait() == 0
    assert command.said.count("finished and unchanged, skipped") == 3
    assert (folder_of(recipe) / "report" / "comparison.md").is_file()


def test_workers_end_with_the_launcher_and_one_process_at_another_zero_stage_goes_on(recipe: Path) -> None:
    command = Command(recipe, 2)
    command.until((folder_of(recipe) / "dpo" / "metrics.jsonl").exists)
    assert len(of_run(recipe)) == 3
    command.send(signal.SIGKILL)
    command.wait()
    nobody_is_left(recipe)
    assert len(checkpoints(folder_of(recipe) / "dpo")) >= 1
    assert Command(recipe, 1, "engine.zero_stage=3", "train.micro_batch_size=4").wait() == 0
    assert not list(folder_of(recipe).glob("*.old-*"))
    assert [line["step"] for line in lines(folder_of(recipe) / "dpo") if line["split"] == "train"] == list(range(1, 9))


def trained_alone(recipe: Path, processes: int) -> dict[str, dict[str, Any]]:
    assert Command(recipe, processes, "output_dir=straight").wait(600) == 0
    return {stage: left_behind(recipe.parent / "straight" / stage) for stage in STAGES}


def same_as(straight: dict[str, dict[str, Any]], recipe: Path) -> None:
    for stage, expected in straight.items():
        folder = folder_of(recipe) / stage
        assert list(differences(expected, left_behind(folder))) == [], stage
        assert not list(filter(is_partial, folder.iterdir())), stage


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
def test_thirty_kills_at_random_moments(processes: int, recipe: Path) -> None:
    """The launcher is killed, and after a moment in which its workers notice, so are they."""
    began = time.monotonic()
    straight = trained_alone(recipe, processes)
    longest = time.monotonic() - began
    killed, draw = 0, random.Random()
    while killed < 30:
        command = Command(recipe, processes)
        time.sleep(draw.uniform(0.05, longest))
        command.send(signal.SIGKILL)
        killed += command.wait() == -signal.SIGKILL
        time.sleep(draw.uniform(0, 0.5))
        for process in of_run(recipe):
            os.kill(process, signal.SIGKILL)
        nobody_is_left(recipe)
    command = Command(recipe, processes)
    assert command.wait(600) == 0, command.said[-3000:]
    same_as(straight, recipe)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_requests_to_stop_at_random_moments(processes: int, recipe: Path) -> None:
    began = time.monotonic()
    straight = trained_alone(recipe, processes)
    longest = time.monotonic() - began
    stopped, draw, slowest = 0, random.Random(), 0.0
    while stopped < 20:
        command = Command(recipe, processes)
        command.begun()
        time.sleep(draw.uniform(0, longest))
        command.send(signal.SIGTERM)
        asked = time.monotonic()
        code = command.wait()
        if code == 0:  # it had finished, and everything is skipped from now on
            same_as(straight, recipe)
            (folder_of(recipe) / "policy" / "done.json").unlink()
            continue
        stopped, slowest = stopped + 1, max(slowest, time.monotonic() - asked)
        assert code == EXIT_SIGTERM
        assert "run the same command to go on" in command.said
        assert "Traceback" not in command.said
        nobody_is_left(recipe, 1)
    command = Command(recipe, processes)
    assert command.wait(600) == 0, command.said[-3000:]
    same_as(straight, recipe)
    print(f"the slowest of 20 took {slowest:.1f} s")
