"""The benchmarks' files: fetched once, what was pinned, or read from a folder that somebody filled."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from aligndistil.benchmarks.files import BenchmarkFile, Files
from aligndistil.errors import ServiceError, UserError

CONTENT = b"questions\n"
PIN = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that can be fetched, and an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = tmp_path / "elsewhere.jsonl"
    path.write_bytes(CONTENT)
    return path


def pinned(path: Path, sha256: str = PIN, also: tuple[str, ...] = ()) -> BenchmarkFile:
    return BenchmarkFile("questions.jsonl", path.as_uri(), sha256, also)


def test_a_file_is_fetched_once(elsewhere: Path) -> None:
    assert Files().get(pinned(elsewhere)) == CONTENT
    elsewhere.unlink()
    assert Files().get(pinned(elsewhere)) == CONTENT
    with pytest.raises(ServiceError, match=r"cannot be fetched .* put questions\.jsonl into a folder"):
        Files().get(pinned(elsewhere, hashlib.sha256(b"another edition").hexdigest()))


def test_what_is_not_what_was_pinned_is_not_kept(elsewhere: Path) -> None:
    elsewhere.write_bytes(b"changed\n")
    with pytest.raises(UserError, match=f"is not what it was: .* {PIN} was expected"):
        Files().get(pinned(elsewhere))
    elsewhere.write_bytes(CONTENT)
    assert Files().get(pinned(elsewhere)) == CONTENT


def test_a_folder_may_hold_it_packed_or_in_another_edition_which_is_said(elsewhere: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    files, file = Files(folder), pinned(elsewhere)
    with pytest.raises(
        UserError, match=r"has no questions\.jsonl \(nor questions\.jsonl\.gz\); it is to be had at file:"
    ):
        files.get(file)
    (folder / "questions.jsonl.gz").write_bytes(gzip.compress(CONTENT))
    assert files.get(file) == CONTENT
    assert files.notes == []
    (folder / "questions.jsonl").write_bytes(b"mine\n")
    assert [files.get(file), files.get(file)] == [b"mine\n"] * 2
    assert len(files.notes) == 1
    assert "is not the pinned edition" in files.notes[0]
    known = Files(folder)
    assert known.get(pinned(elsewhere, also=(hashlib.sha256(b"mine\n").hexdigest(),))) == b"mine\n"
    assert known.notes == []


def test_files_of_the_hub_are_named_by_their_address() -> None:
    file = BenchmarkFile("a.csv", "hf:owner/name@abc:data/a.csv")
    assert file.address == "https://huggingface.co/datasets/owner/name/resolve/abc/data/a.csv"
    with pytest.raises(
        ServiceError, match=r"https://huggingface\.co/datasets/owner/name/resolve/abc/data/a\.csv cannot"
    ):
        Files().get(file)
