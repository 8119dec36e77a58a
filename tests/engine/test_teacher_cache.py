"""Hidden states from disk are those of the model, for just the rows they were made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes
from aligndistil.engine.teacher_cache import (
    CachedModel,
    HiddenStates,
    cache_bytes,
    cache_name,
    damage,
    is_complete,
    unique_rows,
    write_cache,
)
from aligndistil.errors import UserError
from aligndistil.models import load_model
from support.engines import VOCAB, batch_of, examples, section


def pad(rows: list[Row]) -> Batch:
    return collate(rows, DataKind.RESPONSES, 0)


def frozen(folder: str) -> FrozenModel:
    return FrozenModel(load_model(folder, section(folder), trained=False), VOCAB)


def written(folder: Path, model: FrozenModel, rows: list[Row], processes: Processes, size: int = 3) -> HiddenStates:
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    assert sum(write_cache(folder, model, "the/teacher", batches, pad, processes)) == len(rows)
    return HiddenStates(folder)


def test_a_batch_of_known_rows_gets_what_the_model_would_have_said(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model, some = frozen(model_folder(seed=1)), examples(7, DataKind.PAIRS)
    rows = [row for pair in some for row in pair]
    cached = CachedModel(written(tmp_path / "cache", model, rows, processes), model.head)
    for picked in (some[:1], some[2:6], [some[6], some[0]]):
        batch = batch_of(picked, DataKind.PAIRS)
        torch.testing.assert_close(cached.read(batch).hidden, model.read(batch).hidden, rtol=1e-5, atol=1e-5)


def test_the_size_that_is_told_is_that_of_the_file(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model, rows = frozen(model_folder(seed=1)), [row for (row,) in examples(5, DataKind.RESPONSES)]
    written(tmp_path / "cache", model, rows, processes)
    assert (tmp_path / "cache/0.bin").stat().st_size == cache_bytes(rows, model.model.config.hidden_size, torch.float32)


def test_a_row_that_is_not_in_the_cache_is_an_error(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    model = frozen(model_folder(seed=1))
    hidden = written(tmp_path / "cache", model, [Row([5, 6], [7, 1])], processes)
    with pytest.raises(KeyError):
        hidden.of(pad([Row([5], [6, 7, 1])]))  # the same tokens, divided otherwise


def test_a_cache_that_was_not_finished_is_none(
    model_folder: Callable[..., str], tmp_path: Path, processes: Processes
) -> None:
    rows = [row for (row,) in examples(4, DataKind.RESPONSES)]
    batches = [rows[:2], rows[2:]]
    started = write_cache(tmp_path / "cache", frozen(model_folder(seed=1)), "the/teacher", batches, pad, processes)
    next(started)
    started.close()
    assert not is_complete(tmp_path / "cache")
    written(tmp_path / "cache", frozen(model_folder(seed=1)), rows, processes)
    assert is_complete(tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("0.bin", lambda content: bytes(len(content)), "0.bin is not what was written"),
        ("0.bin", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "0.bin is not what was written"),
        ("0.bin", lambda content: content[:-4], "0.bin has 1,276 bytes instead of 1,280"),
        ("0.bin", lambda content: None, "0.bin is missing"),
        ("about.json", lambda content: content[:-4], "about.json is not JSON"),
        ("about.json", lambda content: bytes(len(content)), "about.json is not JSON"),
        ("about.json", lambda content: b"\xff", "about.json is not JSON"),
    ],
    ids=["zeros", "a bit", "cut", "missing", "about cut", "about zeros", "about no text"],
)
def test_what_became_of_a_cache_on_the_disk_is_found(
    file: str,
    harm: Callable[[bytes], bytes | None],
    said: str,
    model_folder: Callable[..., str],
    tmp_path: Path,
    processes: Processes,
) -> None:
    # 10 response tokens, each of 32 numbers of 4 bytes.
    written(tmp_path / "cache", frozen(model_folder(seed=1)), [Row([5], [6] * 10)], processes)
    assert damage(tmp_path / "cache") is None
    path = tmp_path / "cache" / file
    content = harm(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    assert damage(tmp_path / "cache") == said


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
    assert before == {(tmp_path / name).stat().st_ino for name in ("cache", "cache/0.bin", "cache/about.json")}


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
    assert len(unique_rows([*rows, Row([5], [6, 1], label=False)])) == 2


def write_on_two(folder: str, cache: str) -> dict[str, Any]:
    from aligndistil.engine.processes import start_processes

    processes = start_processes()
    rows = [row for (row,) in examples(5, DataKind.RESPONSES)]
    model = frozen(folder)
    hidden = written_part(Path(cache), model, rows, processes)
    batch = pad(rows)
    error = (hidden.of(batch) - model.read(batch).hidden).abs().max()
    refused = ""
    try:  # rank 1 alone gets the row that overflows
        written_part(Path(cache), overflowing(folder), [Row([5], [6, 1]), Row([5], [9, 1])], processes)
    except UserError as said:
        refused = str(said)
    processes.stop()
    return {"error": float(error), "refused": refused}


def written_part(folder: Path, model: FrozenModel, rows: list[Row], processes: Processes) -> HiddenStates:
    for _ in write_cache(folder, model, "the/teacher", [[row] for row in rows], pad, processes):
        pass
    return HiddenStates(folder)


def test_two_processes_write_a_part_each_and_read_both(
    model_folder: Callable[..., str], tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    answers = on_processes(write_on_two, model_folder(seed=1), str(tmp_path / "cache"))
    assert all(answer["error"] < 1e-5 for answer in answers)
    assert all("the/teacher are not all finite" in answer["refused"] for answer in answers)
    parts = json.loads((tmp_path / "cache/about.json").read_text())["parts"]
    assert [len(part["rows"]) for part in parts] == [3, 2]
    assert damage(tmp_path / "cache") is None
