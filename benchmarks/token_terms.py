"""Peak memory and time of the chunked token terms beside the plain full-logits formula, in one run.

    python benchmarks/token_terms.py [--quick] [--compile] [--device cuda] [--write]

Both sides get the same hidden states and heads, compute the same terms, loss and metrics, and leave the gradient in the
policy's hidden states and head. Plain is the formula as one writes it down: for each role log_softmax of the float32
logits of all response tokens, and autograd. The third side is the matrix products of the head and nothing else: how
many times as long as these the head takes says how much is left to gain. Each case runs in a process of its own, the
sides alternating; memory is the highest peak above what the inputs hold, the gradients included, and time the median of
the repetitions: on a CPU the processor time of the process, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from heads import OBJECTIVES, Inputs, Products, make_inputs, ours, plain
from meter import check_the_meter, machine, now, peak, start_of_peak
from page import markdown, replace_table
from rich.console import Console
from rich.table import Table
from torch import Tensor

KINDS = {"aligndistil": ("aligndistil", 2), "dpo, one pair": ("dpo", 2), "dpo, four pairs": ("dpo", 8)}
"""Objectives, and the rows among which the tokens are divided: with one pair DPO's gradient is known in advance."""
SIZES = ((49_152, 576), (151_936, 896))
TOKENS = (512, 1024, 2048, 4096)
SECONDS_PER_CASE = 30.0
"""Repetitions stop when a case has had this long, but each side runs at least once."""
PLAIN_BUFFERS = {"aligndistil": 10, "dpo": 5}
"""The (tokens, V) float32 tensors that plain holds at once, rounded up; decides what is too large to try."""


class Case(NamedTuple):
    kind: str
    vocab: int
    hidden: int
    tokens: int
    device: str
    repetitions: int
    memory_gib: float
    """What plain may take."""
    compiled: bool
    """Whether ours is, as `engine.compile` does it."""

    @property
    def plain_fits(self) -> bool:
        return PLAIN_BUFFERS[KINDS[self.kind][0]] * self.tokens * self.vocab * 4 < self.memory_gib * 2**30

    def inputs(self) -> Inputs:
        name, rows = KINDS[self.kind]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        sizes = {"rows": rows, "tokens": self.tokens, "vocab": self.vocab, "hidden": self.hidden}
        return make_inputs(OBJECTIVES[name], **sizes, device=self.device, dtype=dtype)


def run_case(case: Case) -> dict[str, Any]:
    """Seconds and peak GiB of all sides; `plain` is missing where it does not fit."""
    given = case.inputs()
    sides: dict[str, Callable[[Inputs], float]] = {
        "ours": partial(ours, compiled=case.compiled),
        "products": Products(given),
    }
    if case.compiled:
        sides["ours"](given)
    if case.plain_fits:
        sides["plain"] = plain
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    gradients: dict[str, Tensor] = {}
    started = time.perf_counter()
    for repetition in range(case.repetitions):
        if repetition and time.perf_counter() - started > SECONDS_PER_CASE:
            break
        for side, compute in sides.items():
            given.forget_gradients()
            before = start_of_peak(case.device)
            clock = now(case.device)
            compute(given)
            seconds[side].append(now(case.device) - clock)
            peaks[side].append((peak(case.device) - before) / 2**30)
            if given.hidden.grad is not None:
                gradients.setdefault(side, given.hidden.grad.clone())
    if "plain" in gradients:
        off = (gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert off < (0.05 if case.device == "cuda" else 1e-3), f"the two sides differ by {float(off):.1e}"
    return {
        side: {"seconds": statistics.median(seconds[side]), "gib": max(peaks[side]), "runs": len(seconds[side])}
        for side in sides
    }


def in_its_own_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


HEADERS = (
    *("objective", "V", "tokens", "plain GiB", "ours GiB", "memory", "plain s", "ours s", "time"),
    *("products s", "over products", "runs"),
)


def row_of(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    mine, theirs, products = result["ours"], result.get("plain"), result["products"]
    cells = [case.kind, f"{case.vocab:,}", f"{case.tokens:,}"]
    if theirs is None:
        cells += ["too large", f"{mine['gib']:.2f}", "", "", f"{mine['seconds']:.2f}", ""]
    else:
        cells += [f"{theirs['gib']:.2f}", f"{mine['gib']:.2f}", f"1/{theirs['gib'] / mine['gib']:.1f}"]
        cells += [f"{theirs['seconds']:.2f}", f"{mine['seconds']:.2f}", f"{mine['seconds'] / theirs['seconds']:.2f}"]
    cells += [f"{products['seconds']:.2f}", f"{mine['seconds'] / products['seconds']:.2f}"]
    return (*cells, str(mine["runs"]))


def where(device: str) -> str:
    return machine(device, "bfloat16 weights and hidden states" if device == "cuda" else "float32")


def page(rows: list[tuple[str, ...]], device: str, memory_gib: float, compiled: bool) -> str:
    sizes = ", ".join(f"{hidden} at V = {vocab:,}" for vocab, hidden in SIZES)
    clock = "wall" if device == "cuda" else "processor"
    about = [
        f"{where(device)}{', compiled' if compiled else ''}. Hidden size: {sizes}. Seconds are medians over the runs, "
        f"in {clock} time.",
        f'"Too large": the plain formula would have needed more than {memory_gib:.0f} GiB.',
    ]
    return "\n".join([*about, "", markdown(HEADERS, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only V = 49,152 at 512 and 2,048 tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5, help="at most, of each side (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=9.0, help="GiB that plain may take (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours, as with engine.compile: head")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        case = Case(*json.loads(chosen.case))
        check_the_meter(case.device)
        print(json.dumps(run_case(case)))
        return
    sizes, lengths = (SIZES[:1], (512, 2048)) if chosen.quick else (SIZES, TOKENS)
    table = Table(*HEADERS, title=where(chosen.device))
    rows = []
    for kind in KINDS:
        for vocab, hidden in sizes:
            for tokens in lengths:
                limits = chosen.repetitions, chosen.memory, chosen.compile
                case = Case(kind, vocab, hidden, tokens, chosen.device, *limits)
                rows.append(row_of(case, in_its_own_process(case)))
                table.add_row(*rows[-1])
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    Console(width=140).print(table)
    if chosen.write:
        replace_table("token_terms", page(rows, chosen.device, chosen.memory, chosen.compile))


if __name__ == "__main__":
    main()
