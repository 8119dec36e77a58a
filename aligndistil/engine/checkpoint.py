"""Checkpoints that a killed run can continue from: written whole or not at all, the oldest removed after."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch

from aligndistil.engine.engine import Engine
from aligndistil.errors import UserError
from aligndistil.files import partial_path, remove_partial, replace_folder, start_folder

_RECORD = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.match(path.name) and (path / _RECORD).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(engine: Engine, folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Save weights, optimizer, schedule, random states and `state`, whose "step" names the checkpoint. Collective."""
    processes = engine.processes
    target = folder / f"checkpoint-{state['step']}"
    partial = partial_path(target)
    if processes.is_main:
        remove_partial(folder)
        start_folder(target)
    processes.barrier()
    for tag, deepspeed in engine.deepspeed.items():
        deepspeed.save_checkpoint(str(partial), tag=tag, save_latest=False)
    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(states, partial / f"random-{processes.rank}.pt")
    processes.barrier()
    if processes.is_main:
        record = {"state": state, "processes": processes.world, "zero_stage": engine.zero_stage}
        (partial / _RECORD).write_text(json.dumps(record, indent=2))
        replace_folder(target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    processes.barrier()
    return target


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Restore what `save_checkpoint` saved; returns its `state`. Collective.

    Raises UserError when the checkpoint belongs to another number of processes, or lacks a model.
    """
    record = json.loads((path / _RECORD).read_text())
    if record["processes"] != engine.processes.world:
        raise UserError(
            f"{path} was written by {record['processes']} process(es) and this run has {engine.processes.world}; "
            f"continue with --processes {record['processes']}, or start over with --fresh"
        )
    for tag, deepspeed in engine.deepspeed.items():
        if not (path / tag).is_dir():
            raise UserError(f"{path} has no state of the {tag}: another version wrote it; start over with --fresh")
        deepspeed.load_checkpoint(str(path), tag=tag)
    # Our own file, of plain tensors and numbers.
    states = torch.load(path / f"random-{engine.processes.rank}.pt", weights_only=False)
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    state: dict[str, Any] = record["state"]
    return state
