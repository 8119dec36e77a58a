"""Checkpoints that a killed run can continue from: written whole or not at all, and read only as they were written.

Nothing in them is code: random states are numbers, and what DeepSpeed wrote is read as tensors, numbers and three
classes of its own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy
import torch

from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.engine.reshard import SavedStates, take, trained_parameters
from aligndistil.errors import UserError
from aligndistil.files import partial_path, remove_folder, remove_partial, replace_folder, start_folder

_RECORD = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_OF_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of objects that DeepSpeed keeps beside tensors; they hold numbers."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.match(path.name) and (path / _RECORD).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(engine: Engine, folder: Path, state: dict[str, Any], *, keep: int, of: str = "") -> Path:
    """Save weights, optimizer, schedule, random states and `state`, whose "step" names the checkpoint. Collective.

    `of` says whose it is: only who says the same is to continue it.
    """
    processes = engine.processes
    target = folder / f"checkpoint-{state['step']}"
    partial = partial_path(target)
    if processes.is_main:
        remove_partial(folder)
        start_folder(target)
    processes.barrier()
    for tag, deepspeed in engine.deepspeed.items():
        # What is never trained is where training started from; DeepSpeed knows a tied weight by one of its names only.
        hook = deepspeed.module.register_state_dict_post_hook(_drop_frozen)
        deepspeed.save_checkpoint(str(partial), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        hook.remove()
    torch.save(_random_states(), partial / f"random-{processes.rank}.pt")
    processes.barrier()
    hashes = _hashes(partial, processes)
    if processes.is_main:
        record = {"of": of, "state": state, "layout": _layout(engine), "files": hashes}
        (partial / _RECORD).write_text(json.dumps({**record, "sha256": _hash_of(record)}, indent=2))
        replace_folder(target)
        for old in checkpoints(folder)[:-keep]:
            remove_folder(old)
    processes.barrier()
    return target


def damage(path: Path, processes: Processes, of: str = "") -> str:
    """Why a checkpoint is not to be used, or nothing. Collective: each process reads some of the files."""
    try:
        record = json.loads((path / _RECORD).read_bytes())
        whole = record.pop("sha256") == _hash_of(record)
        written = record["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        return f"{_RECORD} is not as it was written"
    if record["of"] != of or path.name != f"checkpoint-{record['state']['step']}":
        return "it is another stage's, or another version's of this one, or has another name than it was written with"
    there = _hashes(path, processes)
    damaged = (name for name, content in written.items() if there.get(name) != content)
    return next((f"{name} is not as it was written" for name in damaged), "")


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Restore what `save_checkpoint` saved, with whatever processes and ZeRO stage; returns its `state`. Collective.

    Raises UserError when the checkpoint lacks a model, or holds more than tensors and numbers.
    """
    record = json.loads((path / _RECORD).read_text())
    layout, rank = record["layout"], engine.processes.rank
    try:
        for tag, deepspeed in engine.deepspeed.items():
            if not (path / tag).is_dir():
                raise UserError(f"{path} has no state of the {tag}: another version wrote it; start over with --fresh")
            if layout == _layout(engine):
                deepspeed.checkpoint_engine.load = _load_plain
                whole = all(p.requires_grad for p in deepspeed.module.parameters())
                deepspeed.load_checkpoint(str(path), tag=tag, load_module_strict=whole)
            else:
                mapped = functools.partial(_load_plain, map_location="cpu", mmap=True)
                names = trained_parameters(deepspeed)
                take(deepspeed, SavedStates(path / tag, layout["zero_stage"], names, mapped))
        if layout["processes"] == engine.processes.world:
            _restore_random_states(torch.load(path / f"random-{rank}.pt", weights_only=True))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} holds more than tensors and numbers{what}, so that reading it could run code, and was not read: "
            "start over with --fresh"
        ) from error
    state: dict[str, Any] = record["state"]
    return state


def _drop_frozen(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def _layout(engine: Engine) -> dict[str, Any]:
    """What decides which process writes what; DeepSpeed reads its own files only where it is the same."""
    return {"processes": engine.processes.world, "zero_stage": engine.zero_stage, "offload": engine.offload}


def _random_states() -> dict[str, Any]:
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(numpy.asarray(keys, numpy.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def _load_plain(path: str, map_location: Any = None, mmap: bool = False) -> Any:
    """Instead of DeepSpeed's own reading, which would run whatever code a file holds."""
    allowed = []
    for name in _OF_DEEPSPEED:
        module, _, of_module = name.rpartition(".")
        allowed.append(getattr(importlib.import_module(module), of_module))
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def _hashes(folder: Path, processes: Processes) -> dict[str, str]:
    """SHA-256 by name of all files but the record. Collective."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RECORD)
    own = {}
    for path in files[processes.rank :: processes.world]:
        with path.open("rb") as file:
            own[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    found: dict[str, str] = {}
    for part in processes.gather(own):
        found |= part
    return dict(sorted(found.items()))


def _hash_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
