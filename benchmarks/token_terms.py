"""Peak memory and time of the chunked token terms beside the plain full-logits formula, in one run.

    python benchmarks/token_terms.py [--quick] [--device cuda] [--write]

Both sides get the same hidden states and heads, compute the same terms, loss and metrics, and leave the gradient in the
policy's hidden states and head. Plain is the formula as one writes it down: for each role log_softmax of the float32
logits of all response tokens, and autograd. Each case runs in a process of its own, the two sides alternating; memory
is the highest peak above what the inputs hold, the gradients included, and time the median of the repetitions: on a CPU
the processor time of the process, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from meter import check_the_meter, now, peak, start_of_peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aligndistil.batch import Batch
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, chunk_size, token_terms
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Objective, Role
from aligndistil.objectives.dpo import DPO

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- token_terms:begin -->", "<!-- token_terms:end -->"
KINDS: dict[str, tuple[Objective, int]] = {
    "aligndistil": (AlignDistil(), 2),
    "dpo, one pair": (DPO(), 2),
    "dpo, four pairs": (DPO(), 8),
}
"""Objectives, and the rows among which the tokens are divided: with one pair DPO's gradient is known in advance."""
SIZES = ((49_152, 576), (151_936, 896))
TOKENS = (512, 1024, 2048, 4096)
SECONDS_PER_CASE = 30.0
"""Repetitions stop when a case has had this long, but each side runs at least once."""
PLAIN_BUFFERS = {AlignDistil: 10, DPO: 5}
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

    @property
    def plain_fits(self) -> bool:
        return PLAIN_BUFFERS[type(KINDS[self.kind][0])] * self.tokens * self.vocab * 4 < self.memory_gib * 2**30


class Inputs(NamedTuple):
    """What a step has once the models' bodies have run: hidden states of equally long responses, and heads."""

    objective: Objective
    batch: Batch
    hidden: Tensor
    head: Head
    frozen: dict[str, FrozenRole]


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(0)
    objective, rows = KINDS[case.kind]
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    shape = (rows, case.tokens // rows)
    response_BT = torch.ones(shape, dtype=torch.bool, device=case.device)
    ids_BT = torch.randint(case.vocab, shape, device=case.device)
    batch = Batch(objective.data, ids_BT, response_BT, response_BT, response_BT[:, 0])

    def states() -> Tensor:
        return torch.randn(case.tokens, case.hidden, device=case.device, dtype=dtype)

    def head() -> Head:
        linear = nn.Linear(case.hidden, case.vocab, bias=False, device=case.device, dtype=dtype)
        nn.init.normal_(linear.weight, std=case.hidden**-0.5)
        return Head(linear, 1.0, None, case.vocab)

    frozen: dict[str, FrozenRole] = {
        role: FrozenRole(states(), head()) for role in objective.needs if role != Role.POLICY
    }
    for given in frozen.values():
        given.head.linear.requires_grad_(False)
    return Inputs(objective, batch, states().requires_grad_(), head(), frozen)


def ours(given: Inputs) -> float:
    vocab, ids = given.head.vocab, given.batch.ids_BT.flatten()
    known = loss_direction(given.objective, given.batch, {})
    flat = None if known is None else {name: value.flatten() for name, value in known.items()}
    terms = token_terms(Plan(given.objective, given.head, ids, given.frozen, chunk_size(vocab), flat), given.hidden)
    return _backward(given, terms)


def plain(given: Inputs) -> float:
    ids = given.batch.ids_BT.flatten()

    def logps_of(hidden: Tensor, head: Head) -> Tensor:
        return torch.log_softmax((hidden @ head.linear.weight.t()).float(), dim=-1)

    with torch.no_grad():
        logps = {role: logps_of(frozen.hidden, frozen.head) for role, frozen in given.frozen.items()}
    logps[Role.POLICY] = logps_of(given.hidden, given.head)
    if isinstance(given.objective, DPO):
        return _backward(given, plain_dpo(logps, ids))
    assert isinstance(given.objective, AlignDistil)
    return _backward(given, plain_aligndistil(given.objective, logps, ids))


def plain_dpo(logps: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    return {"logp": _pick(logps[Role.POLICY], ids), "ref_logp": _pick(logps[Role.REFERENCE], ids)}


def plain_aligndistil(objective: AlignDistil, logps: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    policy, teacher, reverse = (logps[role] for role in (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER))
    tvd = (teacher.exp() - reverse.exp()).abs().sum(-1) / 2
    alpha = objective.r * tvd + objective.eps
    beta = objective.beta0 / alpha
    target = torch.log_softmax(teacher + alpha[:, None] * (teacher - reverse), dim=-1)
    kl_target = (policy.exp() * (policy - target)).sum(-1)
    with torch.no_grad():
        probs = policy.exp()
        measured = {
            "reward": objective.beta0 * (_pick(teacher, ids) - _pick(reverse, ids)),
            "expected_reward": objective.beta0 * (probs * (teacher - reverse)).sum(-1),
            "kl_teacher": (probs * (policy - teacher)).sum(-1),
        }
    terms = {"weighted_kl": beta * kl_target, "kl_target": kl_target.detach()}
    return terms | {"alpha": alpha, "beta": beta, "tvd": tvd} | measured


def _pick(logps: Tensor, ids: Tensor) -> Tensor:
    return logps.gather(-1, ids[:, None]).squeeze(-1)


def _backward(given: Inputs, terms: dict[str, Tensor]) -> float:
    shaped = {name: value.reshape(given.batch.ids_BT.shape) for name, value in terms.items()}
    loss = given.objective.loss(given.batch, shaped).per_example.mean()
    loss.backward()
    return float(loss.detach())


def run_case(case: Case) -> dict[str, Any]:
    """Seconds and peak GiB of both sides; `plain` is missing where it does not fit."""
    given = make_inputs(case)
    sides: dict[str, Callable[[Inputs], float]] = {"ours": ours}
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
            given.hidden.grad = given.head.linear.weight.grad = None
            before = start_of_peak(case.device)
            clock = now(case.device)
            compute(given)
            seconds[side].append(now(case.device) - clock)
            peaks[side].append((peak(case.device) - before) / 2**30)
            assert given.hidden.grad is not None
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


HEADERS = ("objective", "V", "tokens", "plain GiB", "ours GiB", "memory", "plain s", "ours s", "time", "runs")


def row_of(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    mine, theirs = result["ours"], result.get("plain")
    cells = [case.kind, f"{case.vocab:,}", f"{case.tokens:,}"]
    if theirs is None:
        cells += ["too large", f"{mine['gib']:.2f}", "", "", f"{mine['seconds']:.2f}", ""]
    else:
        cells += [f"{theirs['gib']:.2f}", f"{mine['gib']:.2f}", f"1/{theirs['gib'] / mine['gib']:.1f}"]
        cells += [f"{theirs['seconds']:.2f}", f"{mine['seconds']:.2f}", f"{mine['seconds'] / theirs['seconds']:.2f}"]
    return (*cells, str(mine["runs"]))


def machine(device: str) -> str:
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, bfloat16 weights and hidden states"
    else:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.machine()
        where = f"{name}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, float32"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def markdown(rows: list[tuple[str, ...]], device: str, memory_gib: float) -> str:
    sizes = ", ".join(f"{hidden} at V = {vocab:,}" for vocab, hidden in SIZES)
    clock = "wall" if device == "cuda" else "processor"
    head = [
        f"{machine(device)}. Hidden size: {sizes}. Seconds are medians over the runs, in {clock} time.",
        f'"Too large": the plain formula would have needed more than {memory_gib:.0f} GiB.',
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|---|" + "---:|" * (len(HEADERS) - 1),
    ]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def write(text: str) -> None:
    """Replace what is between the markers of the README."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only V = 49,152 at 512 and 2,048 tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5, help="at most, of each side (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=9.0, help="GiB that plain may take (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        case = Case(*json.loads(chosen.case))
        check_the_meter(case.device)
        print(json.dumps(run_case(case)))
        return
    sizes, lengths = (SIZES[:1], (512, 2048)) if chosen.quick else (SIZES, TOKENS)
    table = Table(*HEADERS, title=machine(chosen.device))
    rows = []
    for kind in KINDS:
        for vocab, hidden in sizes:
            for tokens in lengths:
                case = Case(kind, vocab, hidden, tokens, chosen.device, chosen.repetitions, chosen.memory)
                rows.append(row_of(case, in_its_own_process(case)))
                table.add_row(*rows[-1])
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    Console().print(table)
    if chosen.write:
        write(markdown(rows, chosen.device, chosen.memory))


if __name__ == "__main__":
    main()
