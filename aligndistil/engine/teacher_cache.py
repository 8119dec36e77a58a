"""Frozen models' last hidden states on the responses of the data, on disk: run once, and read by every later run.

Hidden states and not logits: a vocabulary is a hundred times wider. They do not depend on the objective, so that runs
which differ in its fields alone share them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aligndistil.batch import Batch, Row
from aligndistil.engine.head import Head
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.engine.token_terms import FrozenRole

_ABOUT = "about.json"
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
        for part, rows in enumerate(about["parts"]):
            start = 0
            for key, tokens in rows:
                self._places[key] = (part, start, tokens)
                start += tokens
            values = torch.from_file(str(folder / f"{part}.bin"), shared=False, size=start * self._width, dtype=dtype)
            self._parts.append(values.view(start, self._width))

    def of(self, batch: Batch) -> Tensor:
        """(n, H) for the response tokens of a batch, in row-major order, on the CPU."""
        places = [self._places[_key(row)] for row in _rows_of(batch)]
        return torch.cat([self._parts[part][start : start + tokens] for part, start, tokens in places])


def cache_name(model: str, dtype: torch.dtype, rows: Sequence[Row]) -> str:
    """The folder of a cache: everything its content depends on. `model` is the hash of the weights.

    Not the order of the rows: DPO and reverse DPO share their reference's states.
    """
    digest = hashlib.sha256(f"1 {model} {dtype}".encode())
    for key in sorted(map(_key, rows)):
        digest.update(key.encode())
    return digest.hexdigest()


def cache_bytes(rows: Sequence[Row], width: int, dtype: torch.dtype) -> int:
    """What a cache of these rows takes on disk."""
    return sum(len(row.response_ids) for row in rows) * width * dtype.itemsize


def is_complete(folder: Path) -> bool:
    """Whether there is a cache to read."""
    return (folder / _ABOUT).is_file()


def write_cache(
    folder: Path, model: FrozenModel, batches: Sequence[list[Row]], pad: Pad, processes: Processes
) -> Iterator[int]:
    """Run the model on batches of rows and keep its hidden states; yields the rows done. Collective.

    Every process writes a part; the folder is there when all are whole.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    if processes.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.barrier()
    written: list[tuple[str, int]] = []
    width, dtype = 0, torch.float32
    with (aside / f"{processes.rank}.bin").open("wb") as stream:
        for rows in batches[processes.rank :: processes.world]:
            hidden = model.read(pad(rows).to(processes.device)).hidden.cpu().contiguous()
            width, dtype = hidden.shape[1], hidden.dtype
            stream.write(hidden.view(torch.uint8).numpy().tobytes())
            written += [(_key(row), len(row.response_ids)) for row in rows]
            yield len(rows)
    parts = processes.gather((written, width, str(dtype).removeprefix("torch.")))
    if processes.is_main:
        widest = max(parts, key=lambda part: part[1])
        about = {"width": widest[1], "dtype": widest[2], "parts": [part[0] for part in parts if part[0]]}
        (aside / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    processes.barrier()


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
