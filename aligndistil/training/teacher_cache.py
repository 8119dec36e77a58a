"""A frozen model of a stage, read from the teacher cache, which is written first where it is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import rich
from filelock import FileLock
from transformers import PreTrainedModel

from aligndistil.batch import Row
from aligndistil.engine.policy import FrozenModel, on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.teacher_cache import CachedModel, cache_name, is_whole, row_key, write_cache
from aligndistil.errors import UserError, printable
from aligndistil.files import cache_root, partial_path
from aligndistil.models import model_hash
from aligndistil.objectives.base import Prepares
from aligndistil.progress import Steps
from aligndistil.recipe import Stage
from aligndistil.training.data import StageData

_ROWS = 16
"""Rows of similar length that the model is run on at once."""


def caches(stage: Stage) -> bool:
    """Whether the stage reads its frozen models from disk."""
    return stage.engine.teacher_cache and not stage.on_policy and stage.objective.prepares is Prepares.NOTHING


def cached_model(
    role: str, model: PreTrainedModel, path: str, vocab: int, stage: Stage, data: StageData, processes: Processes
) -> CachedModel:
    """The model's head, with its hidden states on the rows of the stage. Collective.

    Raises UserError when the disk has no room for them, or when they are not finite.
    """
    frozen = FrozenModel(on_device(model, processes.device), vocab)
    read = [examples for examples in (data.train, data.eval) if examples is not None]
    every = (row for examples in read for i in range(len(examples)) for row in examples.rows(i))
    rows = list({row_key(row): row for row in every}.values())
    name = cache_name(model_hash(path), model.dtype, stage.model.attn_implementation, rows)
    folder = cache_root() / "hidden" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    if processes.is_main:
        lock.acquire()
    processes.barrier()
    try:
        whole = processes.is_main and is_whole(folder)  # one process reads it through while the others wait
        if processes.is_main and folder.exists() and not whole:
            _say(f"the teacher cache of {path} is damaged and made again: {folder} is not as it was written")
            shutil.rmtree(folder)
        if not processes.gather(whole)[0]:
            what = f"{stage.name}: caching {role.replace('_', ' ')}"
            _write(what, frozen, path, rows, data.tokenizer.pad_token_id, processes, folder)
        return CachedModel(folder, frozen.head)
    finally:
        lock.release()


def _write(
    what: str, model: FrozenModel, path: str, rows: list[Row], pad_id: int, processes: Processes, folder: Path
) -> None:
    width = model.model.config.get_text_config().hidden_size
    size = sum(len(row.response_ids) for row in rows) * width * model.model.dtype.itemsize
    if processes.is_main:  # what an interrupted run wrote is no loss of room
        shutil.rmtree(partial_path(folder), ignore_errors=True)
    # What one process finds: they refuse together, or not at all.
    free: int = processes.gather(shutil.disk_usage(folder.parent).free)[0]
    if processes.is_main:
        _say(f"teacher cache of {path}: {len(rows):,} rows, {size / 2**20:,.1f} MiB in {folder.parent}")
    if size > free:
        raise UserError(
            f"engine.teacher_cache: {folder.parent} has {free / 2**30:.1f} GiB left and the hidden states need "
            f"{size / 2**30:.1f}; set HF_HOME to a larger disk, or leave the field out"
        )
    by_length = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.response_ids))
    batches = [by_length[start : start + _ROWS] for start in range(0, len(by_length), _ROWS)]
    mine = sum(len(batch) for batch in batches[processes.rank :: processes.world])
    with Steps(what, mine, unit="rows", rank=processes.rank) as steps:
        for done in write_cache(folder, model, path, batches, pad_id, processes):
            steps.advance(done)


def _say(text: str) -> None:
    rich.get_console().print(printable(f"  {text}"), soft_wrap=True, highlight=False, markup=False)
