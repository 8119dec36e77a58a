"""Outputs that cannot be written are refused before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligndistil.errors import UserError
from aligndistil.run_folder.outputs import check_file, check_folder


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    check_file(tmp_path / "a" / "b" / "page.html")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    check_folder(tmp_path / "a" / "b")


def test_a_folder_is_no_file_and_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* is a folder; give the name of a file"):
        check_file(tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is no folder, or lies below something that is none"):
            check_folder(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_the_system_refuses_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"--out: /proc/nothing cannot be made: "):
        check_folder(Path("/proc/nothing"))
