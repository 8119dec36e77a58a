"""Peak memory of AlignDistil with policy and teachers as adapters on one base beside three whole models.

    python benchmarks/adapters.py [--model FOLDER] [--tokens 512] [--rows 2] [--steps 3]

Both sides take the same optimizer steps on the same random tokens, on a CPU in float32, each in a process of its own:
what is left of one side's memory is no part of the other's. Their teachers differ: whole ones are copies of the model,
and adapters are new ones on it. What is measured is the resident memory of the process above what it had with all
packages imported: after the models are loaded, after DeepSpeed has them, and at the highest point of the steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from meter import check_the_meter, peak, start_of_peak
from rich.console import Console
from rich.table import Table

from aligndistil import recipe
from aligndistil.batch import DataKind, Row, collate
from aligndistil.engine.config import import_deepspeed
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import start_processes
from aligndistil.models import Bases, export_adapter, load_tokenizer, shared_vocab
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Role

SIDES = ("three whole models", "three adapters on one base")
MIB = 2**20


def measure(side: str, model: str, folder: Path, tokens: int, rows: int, steps: int) -> dict[str, float]:
    """MiB of each part, and seconds a step."""
    check_the_meter("cpu")
    import_deepspeed()
    processes, lora = start_processes(), side == SIDES[1]
    section = recipe.Model.model_validate({"path": model, "dtype": "float32", "lora": {} if lora else None})
    teachers = [_adapter(model, folder / str(seed), seed) for seed in (1, 2)] if lora else [model, model]
    tokenizer = load_tokenizer(model, section)
    before, found = start_of_peak("cpu"), {}
    bases = Bases(section)
    policy = bases.language_model(model, trained=True)
    frozen = {
        role: bases.language_model(path)
        for role, path in zip((Role.TEACHER, Role.REVERSE_TEACHER), teachers, strict=True)
    }
    found["loading"] = (start_of_peak("cpu") - before) / MIB
    vocab = shared_vocab([policy, *frozen.values()], tokenizer)
    train = recipe.Train.model_validate({"batch_size": rows, "micro_batch_size": rows, "learning_rate": 1e-4})
    settings = recipe.Engine.model_validate({"zero_stage": 0})
    engine = Engine(
        policy, frozen, AlignDistil(), train=train, settings=settings, processes=processes, total_steps=steps,
        vocab=vocab,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab, (rows, tokens), generator=draw).tolist()
    batch = collate([Row(one[: tokens // 4], one[tokens // 4 :]) for one in ids], DataKind.RESPONSES, 0)
    began = time.perf_counter()
    for _ in range(steps):
        engine.backward(engine.loss(batch, {}), examples=rows, last=True)
        engine.step()
    found["seconds a step"] = (time.perf_counter() - began) / steps
    found["peak"] = (peak("cpu") - before) / MIB
    found["after the steps"] = (start_of_peak("cpu") - before) / MIB
    return found


def _adapter(model: str, folder: Path, seed: int) -> str:
    """A new adapter on the model, as a stage writes one."""
    section = recipe.Model.model_validate({"path": model, "dtype": "float32", "lora": {}})
    made = Bases(section, seed).language_model(model, trained=True)
    state = {name: p.detach() for name, p in made.named_parameters() if p.requires_grad}
    export_adapter(made, state, model, section, frozenset({1}), folder, "")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--tokens", type=int, default=512, help="of a row, three quarters of them response")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(given.side, given.model, Path(folder), given.tokens, given.rows, given.steps)
        print(json.dumps(found))
        return
    table = Table("MiB", *SIDES, title=f"AlignDistil on {given.model}: {given.rows} rows of {given.tokens} tokens")
    results = []
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    for name in results[0]:
        digits = 2 if name.startswith("seconds") else 0
        table.add_row(name, *(f"{found[name]:,.{digits}f}" for found in results))
    Console().print(table)


if __name__ == "__main__":
    main()
