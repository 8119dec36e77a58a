"""All that only a card can show, in ten minutes and without a network: `make gpu`.

    python scripts/gpu.py [--device cuda] [--folder runs/gpu]

* the tests marked `gpu`;
* the quickstart in bfloat16: its table;
* its first stage again, killed without warning after a checkpoint and started again: the same bits;
* benchmarks/gpu.py, whose tables go to benchmarks/README.md;
* the quickstart in float32, beside the first table, where there is time left.

A part that takes too long is ended, and the next one begins. Each leaves its log in the folder, which is emptied first.
The package need not be installed. `--device cpu` goes the same way with few rows, and writes no table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/quickstart.yaml"
SECONDS = 590.0
FEW_ROWS = ["data.train.limit=64", "data.eval.limit=16", "evaluation.every=null", "evaluation.samples=8"]
"""What the quickstart is cut down to on a CPU."""
EXIT_MISSING = 3
METRICS = {
    "gold_reward": "gold reward",
    "kl_initial": "KL to initial",
    "kl": "KL to DPO",
    "completions/mean_length": "mean length",
}


@dataclass
class Check:
    """One part: what it says of itself, and whether it went well; None where it was not done."""

    name: str
    passed: bool | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Failed(Exception):
    """A part has not done what it should."""


class Run:
    """The parts in their order, each limited in time, and all of them together."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.checks: list[Check] = []
        self._until = time.monotonic() + SECONDS
        visible = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **visible}

    def part(self, name: str, seconds: float, work: Callable[[Check, float], None]) -> None:
        """Do the work, which is given so many seconds, or what is left of the ten minutes."""
        check = Check(name)
        self.checks.append(check)
        began = time.monotonic()
        if (seconds := min(seconds, self._until - began)) < 20:
            check.notes.append("not begun: no time was left")
            return
        print(f"{name} ...", flush=True)
        try:
            work(check, seconds)
            check.passed = True
        except Failed as failure:
            check.passed = False
            check.notes.append(str(failure))
        check.seconds = time.monotonic() - began

    def start(self, log: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A Python process in a group of its own, whose output is appended to a log in the folder."""
        with (self.folder / f"{log}.log").open("ab") as file:
            command = [sys.executable, *map(str, arguments)]
            return subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, process: subprocess.Popen[bytes], log: str, seconds: float, good: Sequence[int] = (0,)) -> str:
        """Wait for it, and return what it has said. Raises Failed where it takes longer, or ends badly."""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            raise Failed(f"not done within {seconds:.0f} s; see {log}.log") from None
        said = (self.folder / f"{log}.log").read_text(errors="replace")
        if process.returncode not in good:
            last = (said.strip().splitlines() or [""])[-1]
            raise Failed(f"exit code {process.returncode}; {log}.log ends with: {last}")
        return said

    def train(self, name: str, *settings: str, stage: str | None = None) -> subprocess.Popen[bytes]:
        """Start the quickstart, into a folder of this name."""
        few = FEW_ROWS if self.device == "cpu" else []
        given = [f"output_dir={self.folder / name}", *few, *settings]
        overrides = [part for one in given for part in ("--set", one)]
        only = ["--stage", stage] if stage else []
        return self.start(name, "-m", "aligndistil", "train", RECIPE, *only, *overrides)

    def tests(self, check: Check, seconds: float) -> None:
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
        said = self.finish(self.start("tests", "-m", "pytest", "-q", "-m", "gpu", *files), "tests", seconds)
        check.notes.append(said.strip().splitlines()[-1].strip("= "))

    def quickstart(self, check: Check, seconds: float, dtype: str) -> None:
        name = f"quickstart-{dtype}"
        self.finish(self.train(name, f"model.dtype={dtype}"), name, seconds)
        check.notes += table(self.folder / name / "report/comparison.json")

    def resume(self, check: Check, seconds: float) -> None:
        """Kill the first stage when it has a checkpoint, start it again, and compare with the one that was not."""
        until = time.monotonic() + seconds
        name, whole = "resumed", self.folder / "quickstart-bfloat16/dpo/final/model.safetensors"
        if not whole.exists():
            raise Failed("there is no quickstart in bfloat16 to compare with")
        every = "checkpoint.every=2" if self.device == "cpu" else "checkpoint.every=24"
        settings = ("model.dtype=bfloat16", every)
        process = self.train(name, *settings, stage="dpo")
        while process.poll() is None and time.monotonic() < until and not has_checkpoint(self.folder / name / "dpo"):
            time.sleep(0.02)
        if process.poll() is not None or time.monotonic() >= until:
            kill(process)
            raise Failed(f"there was no moment to kill it; see {name}.log")
        kill(process)
        self.finish(self.train(name, *settings, stage="dpo"), name, until - time.monotonic())
        again = self.folder / name / "dpo/final/model.safetensors"
        if digest(whole) != digest(again):
            raise Failed(f"other weights than without the interruption: compare {again} with {whole}")
        check.notes.append("killed after a checkpoint; the final weights are the same bits")

    def benchmark(self, check: Check, seconds: float) -> None:
        small = ["--device", "cpu", "--shape", "tiny", "--quick"] if self.device == "cpu" else ["--write"]
        script, found = ROOT / "benchmarks/gpu.py", self.folder / "benchmark.json"
        process = self.start("benchmark", script, *small, "--limit", seconds - 15, "--json", found)
        said = self.finish(process, "benchmark", seconds)
        check.notes += [line.rstrip() for line in said.splitlines()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """It, and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_checkpoint(stage: Path) -> bool:
    return any((path / "checkpoint.json").exists() for path in stage.glob("checkpoint-*"))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def table(path: Path) -> list[str]:
    """A line for each model of a comparison."""
    lines = [f"{'':24}" + "".join(f"{title:>16}" for title in METRICS.values())]
    for result in json.loads(path.read_text())["results"]:
        cells = [result["metrics"].get(key) for key in METRICS]
        lines.append(f"{result['name']:24}" + "".join(f"{'-' if one is None else f'{one:.2f}':>16}" for one in cells))
    return lines


def summary(checks: Sequence[Check]) -> str:
    words = {True: "passed", False: "FAILED", None: "left out"}
    lines = []
    for check in checks:
        lines.append(f"{words[check.passed]:9} {check.seconds:5.0f} s  {check.name}")
        lines += [f"    {note}" for note in check.notes]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/gpu")
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "make gpu: torch sees no CUDA device here; use a machine with one, or `make gpu DEVICE=cpu`, which "
                "goes the same way with few rows",
                file=sys.stderr,
            )
            sys.exit(EXIT_MISSING)
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = Run(options.device, folder)
    run.part("tests marked gpu", 120, run.tests)
    run.part("quickstart in bfloat16", 120, lambda check, seconds: run.quickstart(check, seconds, "bfloat16"))
    run.part("killed and resumed", 90, run.resume)
    run.part("benchmarks/gpu.py", 270, run.benchmark)
    run.part("quickstart in float32", 120, lambda check, seconds: run.quickstart(check, seconds, "float32"))
    text = summary(run.checks)
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\nLogs and this summary: {folder}")
    sys.exit(any(check.passed is False for check in run.checks))


if __name__ == "__main__":
    main()
