"""On one card, without a network: our head and step beside TRL's and Liger's, and beside what the card does at most.

    python benchmarks/gpu.py [--shape qwen2.5-1.5b qwen2.5-7b] [--device cuda] [--quick] [--write]

Random weights at the shapes of well-known models, random rows of one length. Measured for each shape, each part in a
process of its own, so that its peak memory is its own:

* the ceilings: operations a second in the products of a layer and of the head, bytes a second of a copy;
* the head alone: AlignDistil's, DPO's and SFT's loss with its gradient, beside its matrix products and nothing else,
  and beside Liger's fused DPO and cross-entropy, where liger-kernel is installed;
* a whole step: DPO and off-policy AlignDistil, and TRL's DPO, where TRL is installed, with its weights in bfloat16 (as
  it is fastest) and in float32 (as ours keeps a copy). Beside it the floor, from the ceilings: shapes.py has the
  formula. A step whose weights, gradients and optimizer alone need more than the memory is left out.

`--device cpu --shape tiny --quick` goes the same way in half a minute, most of it imports. `make gpu` runs this, and
whatever else needs a card.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from page import markdown, replace_table
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Asked, Ceilings, floor_seconds

PACKAGES = ("transformers", "deepspeed", "triton", "trl", "liger-kernel")
HEAD = ("shape", "objective", "head", "ms", "over products", "peak GiB", "loss")
STEP = ("shape", "objective", "step", "ms", "tokens/s", "floor ms", "over floor", "peak GiB", "first loss", "last loss")


class StepPart(NamedTuple):
    """A part that is a whole step."""

    objective: str
    side: str
    frozen: int
    """Models beside the policy."""
    bytes_a_weight: int
    """Of the policy in bfloat16 training: the weight, its float32 copy, its gradient and its two moments."""


STEPS = {
    "ours dpo": StepPart("dpo", "ours", 1, 2 + 4 + 4 + 8),
    "trl bfloat16": StepPart("dpo", "TRL, bfloat16 weights", 1, 2 + 0 + 2 + 4),
    "trl float32": StepPart("dpo", "TRL, float32 weights", 1, 0 + 4 + 4 + 8),
    "ours aligndistil": StepPart("aligndistil", "ours", 2, 2 + 4 + 4 + 8),
}


def main() -> None:
    options = read_arguments()
    until = time.monotonic() + options.limit
    found = [(asked := asked_of(options, shape), measure(asked, until)) for shape in options.shape]
    text = about(found)
    heads = [row for asked, parts in found for row in head_rows(asked, parts)]
    steps = [row for asked, parts in found for row in step_rows(asked, parts)]
    console = Console(width=140)
    console.print(text)
    for headers, rows in ((HEAD, heads), (STEP, steps)):
        table = Table(*headers)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps({asked.shape: parts for asked, parts in found}, indent=2))
    if options.write:
        replace_table("gpu", "\n\n".join([text, markdown(HEAD, heads, texts=3), markdown(STEP, steps, texts=3)]))
    sys.exit(any(part.get("failed", False) for _, parts in found for part in parts.values()))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b", "qwen2.5-7b"])
    parser.add_argument("--rows", type=int, default=16, help="of a step; a pair is two (default: %(default)s)")
    parser.add_argument("--micro-rows", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row (default: %(default)s)")
    parser.add_argument("--response-share", type=float, default=0.75, help="of the tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="measured, after the warm-up (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="4 rows of 64 tokens, three steps")
    parser.add_argument("--limit", type=float, default=360, help="seconds in all; later parts are left out")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    options = parser.parse_args()
    if options.quick:
        options.rows = options.micro_rows = 4
        options.tokens, options.steps = 64, 3
    if options.micro_rows < 2 or options.micro_rows % 2 or options.rows % options.micro_rows:
        parser.error("--micro-rows must be even, and divide --rows")
    if not 0 < options.response_share < 1:
        parser.error("--response-share must lie between 0 and 1")
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    return options


def asked_of(options: argparse.Namespace, shape: str) -> Asked:
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    sizes = {key: getattr(options, key) for key in ("rows", "micro_rows", "tokens", "response_share", "steps")}
    return Asked(device=options.device, dtype=dtype, shape=shape, **sizes)


def measure(asked: Asked, until: float) -> dict[str, dict[str, Any]]:
    """What each part has found; `missing` says why there is nothing."""

    def run(part: str) -> dict[str, Any]:
        print(f"{asked.shape}: {part}", file=sys.stderr, flush=True)
        return in_its_own_process(part, asked, until - time.monotonic())

    found = {"head": run("head")}
    memory = found["head"].get("ceilings", {}).get("memory_gib", math.inf)
    for part, step in STEPS.items():
        needed = (step.bytes_a_weight + 2 * step.frozen) * asked.sizes.weights / 2**30
        too_large = {"missing": f"needs {needed:.0f} GiB before any activation"}
        found[part] = too_large if needed > memory else run(part)
    return found


def in_its_own_process(part: str, asked: Asked, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"missing": "no time was left"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part, json.dumps(asdict(asked))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"missing": "the time was not enough"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"missing": f"failed: {done.stderr.strip().splitlines()[-1]}", "failed": True}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def about(found: list[tuple[Asked, dict[str, dict[str, Any]]]]) -> str:
    """The machine, the sizes, and the ceilings of each shape."""
    asked, parts = found[0]
    versions = [f"{package} {version}" for package in PACKAGES if (version := installed(package))]
    where = parts["head"]["ceilings"]["device"] if "ceilings" in parts["head"] else "An unknown machine"
    paragraphs = [
        f"{where}, {', '.join(versions)}. A step has {asked.rows} rows of {asked.tokens:,} tokens, {asked.response:,} "
        f"of them in the response, {asked.micro_rows} rows at a time; the head alone has those of one micro-batch. "
        f"Medians of {asked.steps}, in {'wall' if asked.device == 'cuda' else 'processor'} time."
    ]
    for asked, parts in found:
        if (ceilings := parts["head"].get("ceilings")) is not None:
            body, head = (f"{ceilings[part] / 1e12:,.2f} TFLOP/s" for part in ("body", "head"))
            paragraphs.append(
                f"Ceilings at the shape of {asked.shape}: {body} in the body's products, {head} in the head's, "
                f"{ceilings['bandwidth'] / 1e9:,.0f} GB/s."
            )
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def head_rows(asked: Asked, found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    if "missing" in found["head"]:
        return [(asked.shape, "", found["head"]["missing"], *[""] * 4)]
    heads, rows = found["head"]["heads"], []
    for name, result in heads.items():
        objective, side = name.split("/")
        if "missing" in result:
            rows.append((asked.shape, objective, f"{side}: {result['missing']}", *[""] * 4))
            continue
        ratio = "" if side == "products" else f"{result['seconds'] / heads[f'{objective}/products']['seconds']:.2f}"
        cells = [asked.shape, objective, side, f"{1e3 * result['seconds']:,.2f}", ratio, f"{result['gib']:.2f}"]
        rows.append((*cells, "" if side == "products" else f"{result['loss']:.4f}"))
    return rows


def step_rows(asked: Asked, found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for part, step in STEPS.items():
        result = found[part]
        if "missing" in result:
            rows.append((asked.shape, step.objective, f"{step.side}: {result['missing']}", *[""] * 7))
            continue
        seconds, losses = result["seconds"], result["losses"]
        ceilings = found["head"].get("ceilings")
        cells = [asked.shape, step.objective, step.side, f"{1e3 * seconds:,.1f}"]
        cells += [f"{asked.rows * asked.tokens / seconds:,.0f}"]
        cells += ["", ""] if ceilings is None else floor_cells(asked, step, ceilings, seconds)
        rows.append((*cells, f"{result['gib']:.2f}", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
    return rows


def floor_cells(asked: Asked, step: StepPart, measured: dict[str, Any], seconds: float) -> list[str]:
    """The floor in ms, and a step of so many seconds over it."""
    ceilings = Ceilings(measured["body"], measured["head"], measured["bandwidth"])
    floor = floor_seconds(asked, step.frozen, ceilings)
    return [f"{1e3 * floor:,.1f}", f"{seconds / floor:.2f}"]


if __name__ == "__main__":
    main()
