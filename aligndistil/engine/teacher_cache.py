"""Frozen models' last hidden states on the responses of the data, on disk: run once, and read by every later run.

Hidden states and not logits: a vocabulary is a hundred times wider. They do not depend on the objective, so that runs
which differ in its fields alone share them. A cache is a folder of safetensors files, in which each row's states (n, H)
are a tensor named after the row's tokens, and of one checksum of them all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.head import Head
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.engine.token_terms import FrozenRole
from aligndistil.errors import UserError
from aligndistil.files import partial_path, replace_folder, start_folder

_VERSION = 3
"""Raised when what is written changes: older caches are then left alone."""
_CHECKSUM = "checksum"
_FILE_BYTES = 2**30
"""About the size of a file: safetensors writes a file at once, so that a process holds as much in memory."""


class CachedModel:
    """A frozen model of which only the head is left; its body's output is read from the files of a cache."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.head = head
        files: list[Any] = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def read(self, batch: Batch) -> FrozenRole:
        """The states (n, H) that predict the batch's response tokens, in row-major order.

        Raises KeyError for a row that is none of those the cache was made of.
        """
        ids, real, response = batch.ids_BT.cpu(), batch.attention_BT.cpu(), batch.response_BT.cpu()
        rows = [Row(ids[b][real[b] & ~response[b]].tolist(), ids[b][response[b]].tolist()) for b in range(batch.rows)]
        hidden = torch.cat([self._file_of[key].get_tensor(key) for key in map(row_key, rows)])
        return FrozenRole(hidden.to(batch.ids_BT.device), self.head)


def row_key(row: Row) -> str:
    """What a row is called in a cache: a hash of its tokens, prompt and response apart."""
    tokens = json.dumps([list(row.prompt_ids), list(row.response_ids)])
    return hashlib.blake2b(tokens.encode(), digest_size=12).hexdigest()


def cache_name(model: str, dtype: torch.dtype, attention: str | None, rows: Sequence[Row]) -> str:
    """The folder of a cache: everything its content depends on.

    `model` is the hash of the weights, `attention` the implementation that the recipe asks for. Not the order of the
    rows: DPO and reverse DPO share their reference's states.
    """
    keys = "".join(sorted(map(row_key, rows)))
    return hashlib.sha256(f"{_VERSION} {model} {dtype} {attention} {keys}".encode()).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether every file of a cache is there and as it was written. Reads every byte."""
    kept = folder / _CHECKSUM
    return kept.is_file() and kept.read_bytes() == _checksum(folder).encode()


def write_cache(
    folder: Path, model: FrozenModel, named: str, batches: Sequence[list[Row]], pad_id: int, processes: Processes
) -> Iterator[int]:
    """Run the model on batches of rows that all differ and keep its hidden states; yields the rows done. Collective.

    Every process writes files of its own; the folder is there when all are whole and on the disk. Raises UserError, on
    every process, when a value is not finite: it says so of the model `named`.
    """
    aside = partial_path(folder)
    if processes.is_main:
        start_folder(folder)
    processes.barrier()
    mine, finite = batches[processes.rank :: processes.world], True
    states: dict[str, Tensor] = {}
    size = 0
    for number, rows in enumerate(mine, start=1):
        batch = collate(rows, DataKind.RESPONSES, pad_id).to(processes.device)
        hidden = model.read(batch).hidden.cpu()
        if not (finite := bool(torch.isfinite(hidden).all())):
            break
        # Copies: safetensors refuses tensors that lie in the same memory.
        of_row = hidden.split([len(row.response_ids) for row in rows])
        states |= {row_key(row): part.clone() for row, part in zip(rows, of_row, strict=True)}
        size += hidden.nbytes
        if size >= _FILE_BYTES or number == len(mine):
            save_file(states, aside / f"{processes.rank:05}-{number:07}.safetensors")
            states, size = {}, 0
        yield len(rows)
    if not all(processes.gather(finite)):
        if processes.is_main:
            shutil.rmtree(aside)
        raise UserError(
            f"engine.teacher_cache: the hidden states of {named} are not all finite on these rows; its weights are "
            "damaged, or it needs model.dtype: float32"
        )
    if processes.is_main:
        (aside / _CHECKSUM).write_text(_checksum(aside), encoding="utf-8")
        replace_folder(folder)
    processes.barrier()


def _checksum(folder: Path) -> str:
    """SHA-256 of the names and the content of a cache's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
