"""Frozen models' last hidden states on the responses of the data, on disk: run once, and read by every later run.

Hidden states and not logits: a vocabulary is a hundred times wider. They do not depend on the objective, so that runs
which differ in its fields alone share them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aligndistil.batch import Batch, Row
from aligndistil.engine.head import Head
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.engine.token_terms import FrozenRole
from aligndistil.errors import UserError
from aligndistil.files import partial_path, replace_folder, start_folder

_ABOUT = "about.json"
_VERSION = 2
"""Raised when what is written changes: older caches are then left alone."""
Pad = Callable[[list[Row]], Batch]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A frozen model of which only the head is left; its body's output is read from disk."""

    hidden: HiddenStates
    head: Head

    def read(self, batch: Batch) -> FrozenRole:
        """Raises KeyError for a row that is none of those the cache was made of."""
        return FrozenRole(self.hidden.of(batch).to(batch.ids_BT.device), self.head)


class HiddenStates:
    """The states (n, H) that predict the response tokens of known rows, by the rows' tokens."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self._width, dtype = about["width"], getattr(torch, about["dtype"])
        self._places: dict[str, tuple[int, int, int]] = {}
        self._parts: list[Tensor] = []
        for part, told in enumerate(about["parts"]):
            start = 0
            for key, tokens in told["rows"]:
                self._places[key] = (part, start, tokens)
                start += tokens
            values = torch.from_file(str(folder / f"{part}.bin"), shared=False, size=start * self._width, dtype=dtype)
            self._parts.append(values.view(start, self._width))

    def of(self, batch: Batch) -> Tensor:
        """(n, H) for the response tokens of a batch, in row-major order, on the CPU."""
        places = [self._places[_key(row)] for row in _rows_of(batch)]
        return torch.cat([self._parts[part][start : start + tokens] for part, start, tokens in places])


def cache_name(model: str, dtype: torch.dtype, attention: str | None, rows: Sequence[Row]) -> str:
    """The folder of a cache: everything its content depends on.

    `model` is the hash of the weights, `attention` the implementation that the recipe asks for. Not the order of the
    rows: DPO and reverse DPO share their reference's states.
    """
    digest = hashlib.sha256(f"{_VERSION} {model} {dtype} {attention} ".encode())
    for key in sorted(map(_key, rows)):
        digest.update(key.encode())
    return digest.hexdigest()


def cache_bytes(rows: Sequence[Row], width: int, dtype: torch.dtype) -> int:
    """What a cache of these rows takes on disk."""
    return sum(len(row.response_ids) for row in rows) * width * dtype.itemsize


def is_complete(folder: Path) -> bool:
    """Whether there is a cache that was written to its end. What became of it since then, `damage` says."""
    return (folder / _ABOUT).is_file()


def damage(folder: Path) -> str | None:
    """What of a complete cache is not as it was written; None when everything is. Reads every byte."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except ValueError:
        return f"{_ABOUT} is not JSON"
    for number, told in enumerate(about["parts"]):
        part = folder / f"{number}.bin"
        if not part.is_file():
            return f"{part.name} is missing"
        if (size := part.stat().st_size) != told["bytes"]:
            return f"{part.name} has {size:,} bytes instead of {told['bytes']:,}"
        with part.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != told["sha256"]:
                return f"{part.name} is not what was written"
    return None


def write_cache(
    folder: Path, model: FrozenModel, named: str, batches: Sequence[list[Row]], pad: Pad, processes: Processes
) -> Iterator[int]:
    """Run the model on batches of rows and keep its hidden states; yields the rows done. Collective.

    Every process writes a part; the folder is there when all are whole and on the disk. Raises UserError, on every
    process, when a value is not finite: it says so of the model `named`.
    """
    aside = partial_path(folder)
    if processes.is_main:
        start_folder(folder)
    processes.barrier()
    mine = batches[processes.rank :: processes.world]
    parts = processes.gather((yield from _write_part(aside / f"{processes.rank}.bin", model, mine, pad, processes)))
    if None in parts:
        if processes.is_main:
            shutil.rmtree(aside)
        raise UserError(
            f"engine.teacher_cache: the hidden states of {named} are not all finite on these rows; its weights are "
            "damaged, or it needs model.dtype: float32"
        )
    if processes.is_main:
        _write_about(aside, parts)
        replace_folder(folder)
    processes.barrier()


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process has written. A process without rows knows neither width nor dtype."""

    rows: list[tuple[str, int]]
    """Key and number of response tokens of each row, in the order of the file."""
    bytes: int
    sha256: str
    width: int
    dtype: str


def _write_part(
    path: Path, model: FrozenModel, batches: Sequence[list[Row]], pad: Pad, processes: Processes
) -> Generator[int, None, _Part | None]:
    """None when a value is not finite. The checksum is of what was computed, not of what the disk made of it."""
    written: list[tuple[str, int]] = []
    size, digest, width, dtype = 0, hashlib.sha256(), 0, torch.float32
    with path.open("wb") as stream:
        for rows in batches:
            hidden = model.read(pad(rows).to(processes.device)).hidden
            if not torch.isfinite(hidden).all():
                return None
            width, dtype = hidden.shape[1], hidden.dtype
            values = hidden.cpu().contiguous().view(torch.uint8).flatten().numpy().data
            size += stream.write(values)
            digest.update(values)
            written += [(_key(row), len(row.response_ids)) for row in rows]
            yield len(rows)
        stream.flush()
        os.fsync(stream.fileno())
    return _Part(written, size, digest.hexdigest(), width, str(dtype).removeprefix("torch."))


def _write_about(folder: Path, parts: Sequence[_Part]) -> None:
    """The last file of a cache."""
    widest = max(parts, key=lambda part: part.width)
    told = [{"rows": part.rows, "bytes": part.bytes, "sha256": part.sha256} for part in parts if part.rows]
    about = {"width": widest.width, "dtype": widest.dtype, "parts": told}
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def unique_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in a token, in order."""
    return list({_key(row): row for row in rows}.values())


def _rows_of(batch: Batch) -> Iterator[Row]:
    ids, real, response = batch.ids_BT.cpu(), batch.attention_BT.cpu(), batch.response_BT.cpu()
    for b in range(batch.rows):
        yield Row(ids[b][real[b] & ~response[b]].tolist(), ids[b][response[b]].tolist())


def _key(row: Row) -> str:
    told = json.dumps([list(row.prompt_ids), list(row.response_ids)])
    return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
