"""One encodes, the others wait and read; what is half written is never read."""

import threading
import time

import numpy as np
import pytest

from aligndistil.data.cache import ARRAYS, START, EncodedRows, cached
from aligndistil.data.report import Dropped
from aligndistil.errors import UserError
from aligndistil.files import cache_root, partial_path


def piece(count=3, *, first=1, dropped=(2,), notes=()):
    """Rows of two tokens each, numbered from `first`."""
    return EncodedRows(
        tokens=np.arange(2 * count, dtype=np.int32) + 2 * first,
        rows=np.array([[2 * i, 1, 1, 1] for i in range(count)], dtype=np.int64).reshape(-1, 4),
        hashes=np.array([[2**64 - first - i, i] for i in range(count)], dtype=np.uint64).reshape(-1, 2),
        origins=np.arange(first, first + count),
        prompts=np.arange(count, dtype=np.uint64),
        rows_read=count + len(dropped),
        left_out=1,
        dropped={"empty prompt": Dropped(len(dropped), list(dropped))} if dropped else {},
        notes=list(notes),
    )


def pieces(*made):
    yield from made


def test_of_many_askers_one_encodes_and_all_read_the_same():
    encoded, results = [], []

    def encode():
        time.sleep(0.1)
        encoded.append(1)
        yield piece()

    askers = [threading.Thread(target=lambda: results.append(cached("key", encode))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(encoded) == 1
    assert [result.tokens.tolist() for result in results] == [piece().tokens.tolist()] * 4
    assert [result.dropped for result in results] == [piece().dropped] * 4


def test_what_is_stored_is_read_back_and_not_made_again():
    cached("key", lambda: pieces(piece(notes=["one"])))
    again = cached("key", lambda: pytest.fail("encoded twice"))
    for name, (dtype, _) in ARRAYS.items():
        assert getattr(again, name).tolist() == getattr(piece(), name).tolist()
        assert getattr(again, name).dtype == dtype
    assert (again.rows_read, again.left_out, again.notes) == (4, 1, ["one"])


def test_pieces_are_one_source_however_it_is_cut():
    stored = cached("key", lambda: pieces(piece(3), piece(0, dropped=()), piece(5, first=4, dropped=(9, 10))))
    assert stored.tokens.tolist() == [*range(2, 8), *range(8, 18)]
    assert stored.rows[:, START].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert stored.origins.tolist() == list(range(1, 9))
    assert stored.hashes.shape == (8, 2)
    assert (stored.rows_read, stored.left_out) == (4 + 0 + 7, 3)
    assert stored.dropped == {"empty prompt": Dropped(3, [2, 9, 10])}


def test_what_was_read_is_a_map_of_the_files_so_that_it_takes_no_memory():
    stored = cached("key", lambda: pieces(piece()))
    assert all(isinstance(getattr(stored, name), np.memmap) for name in ARRAYS)


def test_pieces_are_written_as_they_come():
    path = partial_path(cache_root() / "data" / "key") / "tokens.npy"
    sizes = []

    def encode():
        for _ in range(3):
            yield piece(50_000)
            sizes.append(path.stat().st_size)

    cached("key", encode)
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 300_000


@pytest.mark.parametrize("failure", [UserError("no such column"), KeyboardInterrupt()])
def test_an_encoder_that_fails_leaves_nothing_behind_and_is_closed(failure):
    closed = []

    def fail():
        try:
            yield piece()
            raise failure
        finally:
            closed.append(1)

    with pytest.raises(type(failure)):
        cached("key", fail)
    assert closed == [1]
    assert not partial_path(cache_root() / "data" / "key").exists()
    assert cached("key", lambda: pieces(piece())).rows_read == 4


def test_a_disk_that_is_full_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aligndistil.data.cache._GrowingArray.append", full)
    closed = []

    def encode():
        try:
            yield piece()
        finally:
            closed.append(1)

    with pytest.raises(UserError, match=r"No space left on device.*set HF_HOME"):
        cached("key", encode)
    assert closed == [1]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_files_are_made_again(damage, name):
    cached("key", lambda: pieces(piece()))
    file = cache_root() / "data" / "key" / f"{name}.npy"
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-4])
    assert cached("key", lambda: pieces(piece(5))).rows_read == 6
    assert cached("key", lambda: pieces(piece())).rows_read == 6


def test_what_an_interrupted_process_left_is_not_read():
    partial = partial_path(cache_root() / "data" / "key")
    partial.mkdir(parents=True)
    (partial / "tokens.npy").write_bytes(b"half")
    assert cached("key", lambda: pieces(piece())).tokens.tolist() == piece().tokens.tolist()
    assert not partial.exists()


@pytest.mark.parametrize("made", [(), (piece(0),)])
def test_an_empty_source_can_be_stored(made):
    cached("key", lambda: pieces(*made))
    empty = cached("key", lambda: pieces(piece()))
    assert [getattr(empty, name).shape for name in ARRAYS] == [(0, *entry) for _, entry in ARRAYS.values()]


def test_the_cache_lies_where_hugging_face_or_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert cache_root() == tmp_path / "hf" / "aligndistil"
    monkeypatch.delenv("HF_HOME")
    assert cache_root() == tmp_path / "xdg" / "aligndistil"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "aligndistil"


def test_a_cache_that_cannot_be_made_says_what_to_set(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the data cache .* cannot be made .*set HF_HOME"):
        cached("key", lambda: pieces(piece()))
