"""scripts/gpu.py: what it says without a card, and what becomes of a part that fails or hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("scripts_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_without_a_card_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "gpu")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "no CUDA device" in line
    assert "make gpu DEVICE=cpu" in line
    assert not (tmp_path / "gpu").exists()


def test_a_part_that_hangs_or_fails_does_not_keep_the_next_from_its_turn(gpu: Any, tmp_path: Path) -> None:
    run = gpu.Run("cpu", tmp_path)
    hanging: list[Any] = []

    def hangs(check: Any, seconds: float) -> None:
        hanging.append(run.start("hangs", "-c", "import time; time.sleep(600)"))
        run.finish(hanging[0], "hangs", 0.2)

    def fails(check: Any, seconds: float) -> None:
        run.finish(run.start("fails", "-c", "raise SystemExit('no such thing')"), "fails", seconds)

    def works(check: Any, seconds: float) -> None:
        check.notes.append(run.finish(run.start("works", "-c", "print(7)"), "works", seconds).strip())

    for work in (hangs, fails, works):
        run.part(work.__name__, 30, work)
    assert hanging[0].poll() is not None
    assert [check.passed for check in run.checks] == [False, False, True]
    said = gpu.summary(run.checks)
    assert "not done within 0 s; see hangs.log" in said
    assert "exit code 1; fails.log ends with: no such thing" in said
    assert "    7" in said


def test_nothing_is_begun_when_the_time_is_over(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 1.0)
    run = gpu.Run("cpu", tmp_path)
    run.part("late", 60, lambda check, seconds: pytest.fail("was begun"))
    assert run.checks[0].passed is None
    assert "left out" in gpu.summary(run.checks)


def test_the_table_has_a_line_for_each_model(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"results": [{"name": "dpo", "metrics": {"gold_reward": 0.25, "kl": 0.0}}]}))
    header, line = gpu.table(path)
    assert header.split()[:2] == ["gold", "reward"]
    assert line.split() == ["dpo", "0.25", "-", "0.00", "-"]
