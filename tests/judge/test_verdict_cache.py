"""Replies on disk: kept by request and repeat, and refused in one sentence where they cannot be."""

import sqlite3
from pathlib import Path

import pytest

from aligndistil.errors import UserError
from aligndistil.files import cache_root
from aligndistil.judge import Reply, VerdictCache


def test_a_reply_is_kept_by_request_and_repeat(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.sqlite"
    cache = VerdictCache(path)
    cache.put("a", 0, Reply("yes", {"m": -0.1}), (3, 1))
    cache.put("a", 1, Reply("no"), (3, 1))
    cache.close()
    again = VerdictCache(path)
    assert again.get("a", 0) == (Reply("yes", {"m": -0.1}), (3, 1))
    assert again.get("a", 1) == (Reply("no"), (3, 1))
    assert again.get("a", 2) is None
    assert again.get("b", 0) is None
    again.put("a", 0, Reply("perhaps"), (3, 1))
    assert VerdictCache(path).get("a", 0) == (Reply("perhaps"), (3, 1))


def test_usage_and_date_stand_beside_a_reply(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.sqlite")
    cache.put("a", 0, Reply("yes"), (3, 1))
    ((reply, date),) = sqlite3.connect(cache.path).execute("SELECT reply, date FROM replies").fetchall()
    assert reply == '{"text": "yes", "logprobs": {}, "usage": [3, 1]}'
    assert len(date) == len("2026-01-01T00:00:00+00:00")
    assert date.endswith("+00:00")


def test_it_lies_in_the_cache_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert VerdictCache().path == cache_root() / "judge" / "verdicts.sqlite"
    assert VerdictCache().get("a", 0) is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(b"nonsense " * 1000)
    with pytest.raises(UserError) as error:
        VerdictCache(path).get("a", 0)
    assert str(error.value) == (
        f"the cache of verdicts {path} is damaged (file is not a database); delete it, and its verdicts are asked again"
    )


def test_a_file_that_is_damaged_in_its_middle_is_refused(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.sqlite")
    for number in range(500):
        cache.put(f"{number:03}", 0, Reply("a reply " * 20), (3, 1))
    cache.close()
    content = bytearray(cache.path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    cache.path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .*; delete it"):
        VerdictCache(cache.path).get("250", 0)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be used .*; make room there, or set HF_HOME"):
        VerdictCache(tmp_path / "file" / "verdicts.sqlite").get("a", 0)
