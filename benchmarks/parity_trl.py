"""TRL's trainers and ours in one run: the same loss curve, and the time and peak memory of a step side by side.

    pip install -c constraints.txt --group trl
    python benchmarks/parity_trl.py [--objective dpo simpo kto] [--data FILE] [--tokenizer FOLDER] [--threads N]

Both sides train the same float32 model (random weights, 17 million of them, vocabulary 49,152; or --model) on the same
rows in the same order with the same AdamW, schedule and clipping, each in a process of its own. They take turns step by
step, so that whatever else the machine does slows both down alike. The script fails when the two have not read the same
tokens, or when a loss differs by more than the tolerance. On a CPU, Linux only; on a machine that does other work as
well, give --threads 1 and look at the processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from parity_prepare import rows_of, save_model, usable_pairs, write_case
from parity_sides import CASES, SEED, SIDES, Case
from rich.console import Console
from rich.table import Table

from aligndistil.data import Sampler
from aligndistil.models import load_tokenizer
from aligndistil.recipe import Model

TOLERANCE = 2e-5
"""Of a loss, relative to the first one."""
WHY = (
    "Both sides compute in float32 and add up the same numbers in another order (chunks of other sizes, rows beside "
    "each other or not, padding or none): that alone changes the first gradient by 3e-7 of its length. AdamW then "
    "divides each weight's gradient by its own size, so that a weight with next to no gradient takes another step, and "
    "the difference grows. TRL differs from itself by 3e-6 when it takes one pair at a time instead of four."
)


def run_in_turns(folder: Path, steps: int, threads: int) -> dict[str, dict[str, Any]]:
    """Both sides, one step each at a time; which goes first changes from step to step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("parity_sides.py")
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for side in SIDES:
            with (folder / f"{side}.log").open("w") as log:
                running[side] = subprocess.Popen(
                    [sys.executable, str(script), side, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            _wait(side, running[side], folder)
        for step in range(1, steps):
            for side in sorted(SIDES, reverse=step % 2 == 0):
                _go(running[side])
                _wait(side, running[side], folder)
        for process in running.values():
            _go(process)
        for side, process in running.items():
            if process.wait() != 0:
                raise SystemExit(_failure(side, folder))
    finally:
        for process in running.values():
            process.kill()
    return {side: json.loads((folder / f"{side}.json").read_text()) for side in SIDES}


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _wait(side: str, process: subprocess.Popen[str], folder: Path) -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(_failure(side, folder))


def _failure(side: str, folder: Path) -> str:
    return f"{(folder / f'{side}.log').read_text()[-4000:]}\nthe side {side} failed"


def show(name: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    """Every step of both sides; the first is not measured, since it makes the optimizer's states."""
    titles = ("step", "loss TRL", "loss ours", "difference", "|grad| TRL", "ours", "s TRL", "ours", "MiB TRL", "ours")
    table = Table(*titles, title=name)
    for column in table.columns:
        column.justify = "right"
    trl, ours = results["trl"], results["ours"]
    for k, (a, b) in enumerate(zip(trl["losses"], ours["losses"], strict=True)):
        cells = [f"{a:.7f}", f"{b:.7f}", f"{b - a:+.1e}", *(f"{side['grad_norms'][k]:.4f}" for side in (trl, ours))]
        for key, form in (("seconds", ".2f"), ("peak_mib", ",.0f")):
            cells += [format(side[key][k - 1], form) if k else "" for side in (trl, ours)]
        table.add_row(str(k + 1), *cells)
    console.print(table)


def show_cost(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Medians of time, highest memory, and how far apart the two are."""
    table = Table("a step", "wall s", "processor s", "peak MiB", "of it above the libraries")
    numbers: dict[str, list[float]] = {}
    for side in ("trl", "ours"):
        result = results[side]
        medians = [statistics.median(result[key]) for key in ("seconds", "cpu_seconds")]
        peak = max(result["peak_mib"])
        numbers[side] = [*medians, peak, peak - result["before_mib"]]
        forms = (".2f", ".2f", ",.0f", ",.0f")
        table.add_row(side, *(format(value, form) for value, form in zip(numbers[side], forms, strict=True)))
    ratios = [trl / ours for trl, ours in zip(numbers["trl"], numbers["ours"], strict=True)]
    table.add_row("trl / ours", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    for key, told in (("seconds", "wall"), ("cpu_seconds", "processor")):
        pairs = zip(results["trl"][key], results["ours"][key], strict=True)
        each = sorted(trl / ours for trl, ours in pairs)
        middle = statistics.median(each)
        console.print(
            f"{told} time of the same step, trl / ours: median {middle:.2f}, from {each[0]:.2f} to {each[-1]:.2f}"
        )


def largest_difference(results: dict[str, dict[str, Any]], key: str) -> float:
    """Of all steps, relative to the value of the first."""
    trl, ours = results["trl"][key], results["ours"][key]
    return max(abs(a - b) for a, b in zip(trl, ours, strict=True)) / abs(trl[0])


def compare(name: str, results: dict[str, dict[str, Any]], tolerance: float, console: Console) -> bool:
    """Print one objective's tables; whether the curves agree. Stops where the sides have not read the same tokens."""
    seen = results["ours"]["seen"]
    for step, (a, b) in enumerate(zip(seen, results["trl"]["seen"], strict=True), start=1):
        if a != b:
            raise SystemExit(f"{name}: at step {step} the two sides have not read the same tokens")
    show(name, results, console)
    off = largest_difference(results, "losses")
    tokens = sum(len(ids) for step in seen for _, ids, _ in step)
    console.print(
        f"{tokens:,} tokens in {len(seen)} steps, the same on both sides. Largest difference: of a loss {off:.1e} of "
        f"the first loss, {'within' if off <= tolerance else 'MORE THAN'} the tolerance of {tolerance:.0e}; of a "
        f"gradient norm {largest_difference(results, 'grad_norms'):.1e} of the first norm."
    )
    points = results["ours"]["reference_points"]
    if points:
        gap = max(abs(a - b) for a, b in zip(points, results["trl"]["reference_points"], strict=True))
        above = sum(point > 0 for point in points)
        console.print(f"z0 is above 0 in {above} steps, up to {max(points):.3f}; largest difference {gap:.1e}.")
    show_cost(results, console)
    return off <= tolerance


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", default="builtin:reviews", help="preference pairs: what `data.train.path` may be")
    parser.add_argument("--model", help="folder of a causal language model; without it, random weights")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; without it, the model's or builtin:tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step; KTO has twice as many responses")
    parser.add_argument("--micro-batch-size", type=int, help="pairs at once, on both sides (not KTO); without it, all")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; longer rows are left out")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side; they never run at once")
    parser.add_argument("--keep", type=Path, help="an empty folder for what the two sides write")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: the first step is not measured, so give 2 or more")
    if arguments.keep and arguments.keep.is_dir() and any(arguments.keep.iterdir()):
        parser.error(f"--keep {arguments.keep}: the folder is not empty")
    arguments.tokenizer = arguments.tokenizer or arguments.model or "builtin:tiny"
    return arguments


def case_of(name: str, arguments: argparse.Namespace) -> Case:
    """TRL estimates KTO's KL inside a micro-batch and ours in the whole step, so there the two have to be one."""
    paired = CASES[name]["kind"] == "pairs"
    size = arguments.batch_size * (1 if paired else 2)
    sampler = Sampler(size * arguments.steps, size, SEED)
    return Case(
        **CASES[name],
        steps=arguments.steps,
        batch_size=size,
        micro_batch_size=(arguments.micro_batch_size or size) if paired else size,
        learning_rate=arguments.learning_rate,
        order=[sampler.batch(step) for step in range(arguments.steps)],
    )


def main() -> None:
    arguments = read_arguments()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("trl is not installed: pip install -c constraints.txt --group trl")
    console = Console(width=120)
    cases = {name: case_of(name, arguments) for name in arguments.objective}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(arguments.keep or scratch)
        tokenizer = load_tokenizer(arguments.tokenizer, Model(path=arguments.tokenizer))
        pairs = list(islice(usable_pairs(arguments, tokenizer), max(case.rows for case in cases.values())))
        # Rendered rows must not go through a template again.
        tokenizer.chat_template = None
        parameters = save_model(arguments, tokenizer, base / "model")
        agree = True
        for name, case in cases.items():
            if len(pairs) < case.rows:
                raise SystemExit(f"{arguments.data}: {len(pairs)} pairs can be used, and {name} needs {case.rows}")
            folder = base / name
            write_case(case, rows_of(case, pairs), base / "model", folder)
            results = run_in_turns(folder, case.steps, arguments.threads)
            agree &= compare(name, results, arguments.tolerance, console)
    versions = ", ".join(f"{package} {version}" for package, version in results["trl"]["versions"].items())
    console.print(f"{versions}; {parameters:,} parameters, float32, {arguments.threads} thread(s). {WHY}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
