"""TRL's trainers and ours in one run: the same loss curve, and the time and peak memory of a step side by side.

    pip install -c constraints.txt --group trl
    python benchmarks/parity_trl.py [--objective dpo simpo kto reward_model aligndistil] [--data FILE] [--model FOLDER]

Both sides train the same float32 model (random weights, 17 million of them, vocabulary 49,152; or --model) on the same
rows in the same order with the same AdamW, schedule and clipping, each in a process of its own. They take turns step by
step, so that whatever else the machine does slows both down alike. The script fails when the two have not read the same
tokens, or when a loss differs by more than the tolerance. On a CPU, Linux only; on a machine that does other work as
well, give --threads 1 and look at the processor time.

TRL has no AlignDistil: off-policy, it is compared with the formula in plain PyTorch (parity_plain.py). Time and memory
are given as multiples of the other side's, and the time also for a token that was computed: one that went through the
body of a model, padding included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

from meter import machine
from page import markdown, replace_table
from parity_prepare import rows_of, save_model, save_others, usable_pairs, write_case
from parity_sides import CASES, SEED, Case
from rich.console import Console
from rich.table import Table

from aligndistil.data import Sampler
from aligndistil.models import load_tokenizer
from aligndistil.recipe import Model

PACKAGES = ("transformers", "trl")
TOLERANCES = {"aligndistil": 1e-4}
"""How far a loss may be from the other side's, relative to the first one: 2e-5, but for a divergence of two models that
are close to each other, of which float32 has fewer digits."""
WHY = (
    "Both sides compute in float32 and add up the same numbers in another order (chunks of other sizes, rows beside "
    "each other or not, padding or none): that alone changes the first gradient by 3e-7 of its length. AdamW then "
    "divides each weight's gradient by its own size, so that a weight with next to no gradient takes another step, and "
    "the difference grows. TRL differs from itself by 3e-6 when it takes one pair at a time instead of four."
)


def run_in_turns(folder: Path, sides: tuple[str, str], steps: int, threads: int) -> dict[str, dict[str, Any]]:
    """Both sides, one step each at a time; which goes first changes from step to step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("parity_sides.py")
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for side in sides:
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
            for side in sides if step % 2 else reversed(sides):
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
    return {side: json.loads((folder / f"{side}.json").read_text()) for side in sides}


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


def show(name: str, peer: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    """Every step of both sides; the first is not measured, since it makes the optimizer's states."""
    titles = ("step", f"loss {peer}", "loss ours", "difference", f"|grad| {peer}", "ours")
    table = Table(*titles, f"s {peer}", "ours", f"MiB {peer}", "ours", title=name)
    for column in table.columns:
        column.justify = "right"
    theirs, ours = results[peer], results["ours"]
    for k, (a, b) in enumerate(zip(theirs["losses"], ours["losses"], strict=True)):
        cells = [f"{a:.7f}", f"{b:.7f}", f"{b - a:+.1e}", *(f"{side['grad_norms'][k]:.4f}" for side in (theirs, ours))]
        for key, form in (("seconds", ".2f"), ("peak_mib", ",.0f")):
            cells += [format(side[key][k - 1], form) if k else "" for side in (theirs, ours)]
        table.add_row(str(k + 1), *cells)
    console.print(table)


def cost_of(result: dict[str, Any]) -> dict[str, float]:
    """Of a step of one side: median times, highest memory, and the processor time of a token that was computed."""
    processor, tokens = result["cpu_seconds"], result["computed_tokens"]
    peak = max(result["peak_mib"])
    return {
        "wall s": statistics.median(result["seconds"]),
        "processor s": statistics.median(processor),
        "peak MiB": peak,
        "above the libraries": peak - result["before_mib"],
        "computed tokens": sum(tokens) / len(tokens),
        "ms a computed token": 1e3 * sum(processor) / sum(tokens),
    }


def show_cost(peer: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    """The cost of both sides, and ours as a multiple of the other's."""
    costs = {side: cost_of(results[side]) for side in (peer, "ours")}
    table = Table("a step", *costs[peer])
    for side, cost in costs.items():
        table.add_row(side, *(f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in cost.values()))
    table.add_row(f"ours / {peer}", *(f"{costs['ours'][key] / value:.2f}" for key, value in costs[peer].items()))
    console.print(table)
    for key, told in (("seconds", "wall"), ("cpu_seconds", "processor")):
        pairs = zip(results["ours"][key], results[peer][key], strict=True)
        each = sorted(ours / theirs for ours, theirs in pairs)
        middle = statistics.median(each)
        console.print(
            f"{told} time of the same step, ours / {peer}: median {middle:.2f}, from {each[0]:.2f} to {each[-1]:.2f}"
        )


def largest_difference(peer: str, results: dict[str, dict[str, Any]], key: str) -> float:
    """Of all steps, relative to the value of the first."""
    theirs, ours = results[peer][key], results["ours"][key]
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / abs(theirs[0])


def compare(name: str, peer: str, results: dict[str, dict[str, Any]], tolerance: float, console: Console) -> float:
    """Print one objective's tables, and give the largest difference of a loss.

    Stops where the sides have not read the same tokens.
    """
    seen = results["ours"]["seen"]
    for step, (a, b) in enumerate(zip(seen, results[peer]["seen"], strict=True), start=1):
        if a != b:
            raise SystemExit(f"{name}: at step {step} the two sides have not read the same tokens")
    show(name, peer, results, console)
    off = largest_difference(peer, results, "losses")
    tokens = sum(len(ids) for step in seen for _, ids, _ in step)
    console.print(
        f"{tokens:,} tokens in {len(seen)} steps, the same on both sides. Largest difference: of a loss {off:.1e} of "
        f"the first loss, {'within' if off <= tolerance else 'MORE THAN'} the tolerance of {tolerance:.0e}; of a "
        f"gradient norm {largest_difference(peer, results, 'grad_norms'):.1e} of the first norm."
    )
    points = results["ours"]["reference_points"]
    if points:
        gap = max(abs(a - b) for a, b in zip(points, results[peer]["reference_points"], strict=True))
        above = sum(point > 0 for point in points)
        console.print(f"z0 is above 0 in {above} steps, up to {max(points):.3f}; largest difference {gap:.1e}.")
    show_cost(peer, results, console)
    return off


HEADERS = (
    *("objective", "beside", "loss difference", "s", "ours s", "time", "MiB", "ours MiB", "memory"),
    *("memory above the libraries", "time of a computed token"),
)


def row_of(name: str, peer: str, results: dict[str, dict[str, Any]], off: float) -> tuple[str, ...]:
    """A line of the last table: ours as a multiple of the other side's."""
    theirs, ours = cost_of(results[peer]), cost_of(results["ours"])
    ratio = {key: f"{ours[key] / theirs[key]:.2f}" for key in ours}
    times = [f"{theirs['processor s']:.2f}", f"{ours['processor s']:.2f}", ratio["processor s"]]
    memory = [f"{theirs['peak MiB']:,.0f}", f"{ours['peak MiB']:,.0f}", ratio["peak MiB"]]
    beside = {"trl": "TRL", "plain": "plain PyTorch"}[peer]
    return (name, beside, f"{off:.1e}", *times, *memory, ratio["above the libraries"], ratio["ms a computed token"])


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
    parser.add_argument(
        "--tolerance", type=float, help="of a loss, instead of 2e-5 (aligndistil: 1e-4) of the first one"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side; they never run at once")
    parser.add_argument("--keep", type=Path, help="an empty folder for what the two sides write")
    parser.add_argument("--write", action="store_true", help="write the last table into benchmarks/README.md")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: the first step is not measured, so give 2 or more")
    if arguments.keep and arguments.keep.is_dir() and any(arguments.keep.iterdir()):
        parser.error(f"--keep {arguments.keep}: the folder is not empty")
    arguments.tokenizer = arguments.tokenizer or arguments.model or "builtin:tiny"
    return arguments


def case_of(name: str, arguments: argparse.Namespace) -> Case:
    """TRL estimates KTO's KL inside a micro-batch and ours in the whole step, so there the two have to be one."""
    paired = CASES[name]["kind"] != "unpaired"
    size = arguments.batch_size * (1 if paired else 2)
    sampler = Sampler(size * arguments.steps, size, SEED)
    return Case(
        **CASES[name],
        steps=arguments.steps,
        batch_size=size,
        micro_batch_size=(arguments.micro_batch_size or size) if paired else size,
        learning_rate=arguments.learning_rate,
        tolerance=arguments.tolerance or TOLERANCES.get(name, 2e-5),
        order=[sampler.batch(step) for step in range(arguments.steps)],
    )


def main() -> None:
    arguments = read_arguments()
    cases = {name: case_of(name, arguments) for name in arguments.objective}
    if any(case.peer == "trl" for case in cases.values()) and importlib.util.find_spec("trl") is None:
        raise SystemExit("trl is not installed: pip install -c constraints.txt --group trl")
    console = Console(width=140)
    rows, agree = [], True
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(arguments.keep or scratch)
        tokenizer = load_tokenizer(arguments.tokenizer, Model(path=arguments.tokenizer))
        pairs = list(islice(usable_pairs(arguments, tokenizer), max(case.rows for case in cases.values())))
        # Rendered rows must not go through a template again.
        tokenizer.chat_template = None
        parameters = save_model(arguments, tokenizer, base / "model")
        save_others(base / "model")
        for name, case in cases.items():
            if len(pairs) < case.rows:
                raise SystemExit(f"{arguments.data}: {len(pairs)} pairs can be used, and {name} needs {case.rows}")
            folder = base / name
            write_case(case, rows_of(case, pairs), base, folder)
            results = run_in_turns(folder, (case.peer, "ours"), case.steps, arguments.threads)
            off = compare(name, case.peer, results, case.tolerance, console)
            agree &= off <= case.tolerance
            rows.append(row_of(name, case.peer, results, off))
    table = Table(*HEADERS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    about = (
        f"{machine('cpu', 'float32')}, {', '.join(versions())}; {arguments.threads} thread(s). {parameters:,} "
        f"parameters; {arguments.batch_size} pairs of {Path(arguments.data).name} a step. Seconds are medians of "
        f"processor time over {arguments.steps - 1} steps, MiB the highest resident memory in any of them."
    )
    console.print(f"{about} {WHY}")
    if arguments.write:
        replace_table("parity", "\n".join([textwrap.fill(about, 100), "", markdown(HEADERS, rows, texts=2)]))
    sys.exit(0 if agree else 1)


def versions() -> list[str]:
    found = {name: importlib.util.find_spec(name) and importlib.metadata.version(name) for name in PACKAGES}
    return [f"{name} {version}" for name, version in found.items() if version]


if __name__ == "__main__":
    main()
