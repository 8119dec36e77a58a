"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aligndistil.files import partial_path, replace_folder, start_folder, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "a" / "file", text)
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("file", "two")]


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")

    def cut(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert partial_path(tmp_path / "file").exists()


def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for folder, text in ((target, "old"), (start_folder(target), "new")):
        write_text(folder / "below" / text, text)
    replace_folder(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in (tmp_path / "target" / "below").iterdir()] == ["new"]


@pytest.mark.parametrize("there", ["link", "file"])
def test_a_folder_takes_the_place_of_what_is_none(tmp_path: Path, there: str) -> None:
    target = tmp_path / "target"
    if there == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.write_text("a file")
    write_text(start_folder(target) / "new", "content")
    replace_folder(target)
    assert not target.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    write_text(start_folder(target) / "below" / "file", "content")
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename

    def recorded_sync(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        happened.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    replace_folder(target)
    before = happened.index("renamed")
    assert set(happened[:before]) == {"file", "below", partial_path(target).name}
    assert happened[before + 1 :] == [tmp_path.name]
