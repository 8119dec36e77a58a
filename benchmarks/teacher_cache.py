"""What `engine.teacher_cache` saves: off-policy AlignDistil that runs its teachers, writes the cache, and reads it.

    python benchmarks/teacher_cache.py [--model FOLDER] [--teacher FOLDER] [--reverse-teacher FOLDER] [--data FILE]

Each side is `aligndistil train` in a process of its own, with an empty cache folder, one after the other, several times
in turn. The step times are the medians of all steps but the first two; the memory is the process's own peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, list[dict[str, float]]] = {"runs its teachers": [], "writes the cache": [], "reads it": []}
        for turn in range(asked.turns):
            for side, cached in (("runs its teachers", False), ("writes the cache", True), ("reads it", True)):
                name = f"{side.replace(' ', '-')}-{turn}"
                sides[side].append(train(asked, Path(folder), name, Path(folder) / f"cache-{turn}", cached))
                print(f"{side}: {sides[side][-1]}", flush=True)
    show(asked, sides)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--teacher", help="default: the model")
    parser.add_argument("--reverse-teacher", help="default: the model, whose cache then serves both")
    parser.add_argument("--data", default="builtin:reviews", help="preference pairs")
    parser.add_argument("--limit", type=int, default=512, help="rows of the data")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="of prompt and of response")
    parser.add_argument("--turns", type=int, default=2)
    return parser.parse_args()


def recipe(asked: argparse.Namespace, name: str, cached: bool) -> dict[str, Any]:
    teacher, reverse = asked.teacher or asked.model, asked.reverse_teacher or asked.model
    batch = {"batch_size": asked.batch_size, "micro_batch_size": asked.micro_batch_size, "max_steps": asked.steps}
    lengths = {"max_prompt_length": asked.max_length, "max_response_length": asked.max_length}
    return {
        "name": name,
        "model": {"path": asked.model},
        "data": {"train": {"path": asked.data, "limit": asked.limit}, **lengths},
        "train": {"learning_rate": 1e-5, **batch},
        "engine": {"zero_stage": 0, "teacher_cache": cached},
        "stages": {
            "stage": {
                "objective": {"name": "aligndistil", "r": 5},
                "models": {"teacher": teacher, "reverse_teacher": reverse},
            }
        },
    }


def train(asked: argparse.Namespace, folder: Path, name: str, cache: Path, cached: bool) -> dict[str, float]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(asked, name, cached)))
    began = time.perf_counter()
    environment = {**os.environ, "HF_HOME": str(cache)}
    command = [sys.executable, "-m", "aligndistil", "train", str(path), "--set", f"output_dir={folder / name}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (folder / name / "stage/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    hidden = cache / "aligndistil/hidden"
    return {
        "step_seconds": statistics.median(line["perf/step_seconds"] for line in steps[2:]),
        "command_seconds": seconds,
        "peak_gib": max(line["perf/peak_memory_gib"] for line in steps),
        "cache_mib": sum(file.stat().st_size for file in hidden.rglob("*.safetensors")) / 2**20,
        "loss": steps[-1]["loss"],
    }


def show(asked: argparse.Namespace, sides: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{asked.model}, {asked.steps} steps of {asked.batch_size}, {asked.turns} turn(s)\n")
    print("| off-policy AlignDistil that | step s | ratio | whole command s | peak GiB | cache MiB | last loss |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in sides.items()
    }
    plain = medians["runs its teachers"]["step_seconds"]
    for side, m in medians.items():
        print(
            f"| {side} | {m['step_seconds']:.2f} | {m['step_seconds'] / plain:.2f} | {m['command_seconds']:.0f} "
            f"| {m['peak_gib']:.2f} | {m['cache_mib']:.0f} | {m['loss']:.6f} |"
        )


if __name__ == "__main__":
    main()
