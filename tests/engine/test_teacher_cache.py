"""Hidden states from disk are those of the model, for just the rows they were made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine import teacher_cache
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.engine.teacher_cache import CachedModel, cache_name, is_whole, row_key, write_cache
from aligndistil.errors import UserError
from aligndistil.models import load_model
from support.engines import VOCAB, batch_of, examples, section


def pad(rows: list[Row]) -> Batch:
    return collate(rows, DataKind.RESPONSES, 0)


def frozen(folder: str) -> FrozenModel:
    return FrozenModel(load_model(folder, section(folder), trained=False), VOCAB)


def written(folder: Path, model: FrozenModel, rows: list[Row], processes: Processes, size: int = 3) -> CachedModel:
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    mine = sum(len(batch) for batch in batches[processes.rank :: processes.world])
    assert sum(write_cache(folder, model, "the/teacher", batches, 0, processes)) == mine
    return CachedModel(folder, model.head)


@pytest.mark.parametrize(("file_bytes", "files"), [(2**30, 1), (1, 5)], ids=["one file", "several files"])
def test_a_batch_of_known_rows_gets_what_the_model_would_have_said(
    file_bytes: int,
    files: int,
    model_folder: Callable[..., str],
    tmp_path: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_cache, "_FILE_BYTES", file_bytes)
    model, some = frozen(model_folder(seed=1)), examples(7, DataKind.PAIRS)
    rows = [row for pair in some for row in pair]
    cached = written(tmp_path / "cache", model, rows, processes)
    assert len([*(tmp_path / "cache").glob("*.safetensors")]) == files
    for picked in (some[:1], some[2:6], [some[6], some[0]]):
        batch = batch_of(picked, DataKind.PAIRS)
        torch.testing.assert_close(cached.read(batch).hidden, model.read(batch).hidden, rtol=1e-5, atol=1e-5)


def test_the_files_are_safetensors_of_a_tensor_for_each_row(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model, rows = frozen(model_folder(seed=1)), [row for (row,) in examples(5, DataKind.RESPONSES)]
    written(tmp_path / "cache", model, rows, processes, size=5)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    width = model.model.config.hidden_size
    shapes = {key: tuple(states.shape) for key, states in load_file(file).items()}
    assert shapes == {row_key(row): (len(row.response_ids), width) for row in rows}


def test_a_row_that_is_not_in_the_cache_is_an_error(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model = frozen(model_folder(seed=1))
    cached = written(tmp_path / "cache", model, [Row([5, 6], [7, 1])], processes)
    with pytest.raises(KeyError):
        cached.read(pad([Row([5], [6, 7, 1])]))  # the same tokens, divided otherwise


def test_a_cache_that_was_not_finished_is_none(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    rows = [row for (row,) in examples(4, DataKind.RESPONSES)]
    batches = [rows[:2], rows[2:]]
    started = write_cache(tmp_path / "cache", frozen(model_folder(seed=1)), "the/teacher", batches, 0, processes)
    next(started)
    started.close()
    assert not is_whole(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    written(tmp_path / "cache", frozen(model_folder(seed=1)), rows, processes)
    assert is_whole(tmp_path / "cache")


STATES = "00000-0000001.safetensors"


@pytest.mark.parametrize("file", [STATES, "checksum"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda content: bytes(len(content)),
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-4],
        lambda content: b"\xff",
        lambda content: None,
    ],
    ids=["zeros", "a bit", "cut", "no text", "missing"],
)
def test_what_became_of_a_cache_on_the_disk_is_found(
    file: str,
    harm: Callable[[bytes], bytes | None],
    model_folder: Callable[..., str],
    tmp_path: Path,
    processes: Processes,
) -> None:
    written(tmp_path / "cache", frozen(model_folder(seed=1)), [Row([5], [6] * 10)], processes)
    assert is_whole(tmp_path / "cache")
    path = tmp_path / "cache" / file
    content = harm(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    assert not is_whole(tmp_path / "cache")


def test_everything_is_on_the_disk_before_the_cache_has_its_name(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        really(descriptor)
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "cache").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    written(tmp_path / "cache", frozen(model_folder(seed=1)), [Row([5], [6, 1])], processes)
    before = {number for number, there in synced if not there}
    assert before == {(tmp_path / name).stat().st_ino for name in ("cache", f"cache/{STATES}", "cache/checksum")}


def overflowing(folder: str) -> FrozenModel:
    """A model that overflows on token 9, and on no other."""
    model = frozen(folder)
    model.model.get_input_embeddings().weight.data[9] = float("inf")
    return model


def test_states_that_are_not_finite_are_refused_and_leave_nothing(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model, rows = overflowing(model_folder(seed=1)), [Row([5], [6, 1]), Row([5], [9, 6, 1])]
    written(tmp_path / "fine", model, rows[:1], processes)
    with pytest.raises(UserError, match=r"hidden states of the/teacher are not all finite .* model\.dtype: float32"):
        written(tmp_path / "cache", model, rows, processes, size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["fine"]


def test_a_cache_is_named_after_weights_dtype_attention_and_rows() -> None:
    rows = [Row([5], [6, 1]), Row([5, 6], [1])]
    names = {
        cache_name("a", torch.float32, None, rows),
        cache_name("b", torch.float32, None, rows),
        cache_name("a", torch.bfloat16, None, rows),
        cache_name("a", torch.float32, "eager", rows),
        cache_name("a", torch.float32, None, rows[:1]),
        cache_name("a", torch.float32, None, [Row([5, 6], [1]), Row([5, 6], [1])]),
    }
    assert len(names) == 6
    assert cache_name("a", torch.float32, None, rows[::-1]) in names
    assert row_key(rows[0]) != row_key(rows[1])
    assert row_key(rows[0]) == row_key(Row([5], [6, 1], label=False))


def write_on_two(folder: str, cache: str) -> dict[str, Any]:
    from aligndistil.engine.processes import start_processes

    processes = start_processes()
    rows = [row for (row,) in examples(5, DataKind.RESPONSES)]
    model = frozen(folder)
    batch = pad(rows)
    cached = written(Path(cache), model, rows, processes, size=1)
    error = (cached.read(batch).hidden - model.read(batch).hidden).abs().max()
    refused = ""
    try:  # rank 1 alone gets the row that overflows
        written(Path(cache), overflowing(folder), [Row([5], [6, 1]), Row([5], [9, 1])], processes, size=1)
    except UserError as said:
        refused = str(said)
    processes.stop()
    return {"error": float(error), "refused": refused}


def test_two_processes_write_a_part_each_and_read_both(
    model_folder: Callable[..., str], tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    answers = on_processes(write_on_two, model_folder(seed=1), str(tmp_path / "cache"))
    assert all(answer["error"] < 1e-5 for answer in answers)
    assert all("the/teacher are not all finite" in answer["refused"] for answer in answers)
    parts = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert [len(load_file(part)) for part in parts] == [3, 2]
    assert is_whole(tmp_path / "cache")
