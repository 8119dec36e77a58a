"""One encodes, the others wait and read; what is half written is never read."""

import threading
import time

import numpy as np
import pytest

from aligndistil.data.cache import EncodedRows, cached
from aligndistil.errors import UserError
from aligndistil.files import cache_root, partial_path


def rows(count=3):
    return EncodedRows(
        tokens=np.arange(2 * count, dtype=np.int32),
        rows=np.array([[2 * i, 1, 1, 1] for i in range(count)], dtype=np.int64),
        origins=np.arange(1, count + 1),
        rows_read=count + 1,
        left_out=0,
        dropped=[("empty prompt", 2)],
    )


def test_of_many_askers_one_encodes_and_all_read_the_same():
    encoded, results = [], []

    def encode():
        time.sleep(0.1)
        encoded.append(1)
        return rows()

    askers = [threading.Thread(target=lambda: results.append(cached("key", encode))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(encoded) == 1
    assert [result.tokens.tolist() for result in results] == [rows().tokens.tolist()] * 4
    assert [[tuple(drop) for drop in result.dropped] for result in results] == [[("empty prompt", 2)]] * 4


def test_what_is_stored_is_read_back_and_not_made_again():
    cached("key", rows)
    again = cached("key", lambda: pytest.fail("encoded twice"))
    assert again.rows.tolist() == rows().rows.tolist()
    assert (again.rows_read, again.left_out) == (4, 0)


def test_an_encoder_that_fails_leaves_nothing_behind():
    def fail():
        raise UserError("no such column")

    with pytest.raises(UserError, match="no such column"):
        cached("key", fail)
    assert cached("key", rows).rows_read == 4


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_files_are_made_again(damage):
    cached("key", rows)
    tokens = cache_root() / "data" / "key" / "tokens.npy"
    content = tokens.read_bytes()
    tokens.unlink()
    if damage == "truncated":
        tokens.write_bytes(content[:-4])
    assert cached("key", lambda: rows(5)).rows_read == 6
    assert cached("key", rows).rows_read == 6


def test_what_an_interrupted_process_left_is_not_read():
    partial = partial_path(cache_root() / "data" / "key")
    partial.mkdir(parents=True)
    (partial / "tokens.npy").write_bytes(b"half")
    assert cached("key", rows).tokens.tolist() == rows().tokens.tolist()
    assert not partial.exists()


def test_an_empty_source_can_be_stored():
    cached("key", lambda: rows(0))
    assert len(cached("key", rows).tokens) == 0


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
        cached("key", rows)
