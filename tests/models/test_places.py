"""Where models lie, and what tells one content of a place from another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from aligndistil.errors import ServiceError, UserError
from aligndistil.models import load_model, load_tokenizer, located, model_exists, model_hash, stop_ids
from aligndistil.recipe import Model
from support.models import build_tokenizer

ModelFolder = Callable[..., str]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def copy(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A model folder to change."""
    return Path(shutil.copytree(model_folder(seed=0, tied=False), tmp_path / "model"))


@pytest.fixture
def hub(model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the Hub's client keeps of owner/name: the branch main, and an older commit with the tag v1."""
    root = tmp_path / "hub"
    cached = root / "models--owner--name"
    for commit, tag, seed in ((OLD, "v1", 1), (NEW, "main", 2)):
        shutil.copytree(model_folder(seed=seed), cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / tag).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cached


def test_a_revision_follows_the_name_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located("owner/name") == ("owner/name", {})
    assert located("owner/name@v1") == ("owner/name", {"revision": "v1"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@home").mkdir()
    assert located("run@home") == ("run@home", {})


def test_a_local_folder_has_no_revision(copy: Path) -> None:
    with pytest.raises(UserError, match=r"is a local folder, which has no revisions; give '.*model'$"):
        model_exists(f"{copy}@v1")


def test_every_part_of_a_model_is_of_the_revision_that_is_named(hub: Path) -> None:
    (hub / "snapshots" / OLD / "generation_config.json").write_text('{"eos_token_id": 7}')
    old, new = ("owner/name@v1", "owner/name")
    at = f"owner/name@{NEW}"
    heads = {path: load_model(path, Model(path=path), trained=False).lm_head.weight for path in (old, new, at)}
    assert not torch.equal(heads[old], heads[new])
    assert torch.equal(heads[at], heads[new])
    ends = {path: stop_ids(path, Model(path=path), load_tokenizer(path, Model(path=path))) for path in (old, new)}
    assert 7 in ends[old]
    assert 7 not in ends[new]


def test_a_hub_model_is_its_commit(hub: Path) -> None:
    assert model_hash("owner/name@v1") == model_hash(f"owner/name@{OLD}") == f"owner/name@{OLD}"
    assert model_hash("owner/name") == f"owner/name@{NEW}"
    (hub / "refs" / "main").write_text(OLD)
    assert model_hash("owner/name") == f"owner/name@{OLD}"


def test_a_hub_that_is_out_of_reach_is_one_sentence(hub: Path) -> None:
    with pytest.raises(ServiceError, match="the Hugging Face Hub cannot be reached"):
        model_hash("owner/another")


def test_the_hash_follows_the_content_of_a_folder(copy: Path) -> None:
    before = model_hash(str(copy))
    (copy / "notes.md").write_text("not part of the model")
    assert model_hash(str(copy)) == before
    weights = {name: value.clone() for name, value in load_file(copy / "model.safetensors").items()}
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = model_hash(str(copy))
    assert changed != before
    build_tokenizer(["other", "words"]).save_pretrained(copy)
    assert model_hash(str(copy)) not in (before, changed)


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    content = bytearray(5 * 2**20)
    hashes = set[str]()
    for place in (None, 2**21 + 1):
        if place is not None:
            content[place] = 1
        weights.write_bytes(content)
        os.utime(weights, ns=(0, len(hashes) + 1))
        hashes.add(model_hash(str(tmp_path)))
    assert len(hashes) == 2


@pytest.mark.parametrize("name", ["merges.txt", "modeling_own.py", "chat_template.jinja"])
def test_files_beside_the_weights_count(copy: Path, name: str) -> None:
    before = model_hash(str(copy))
    (copy / name).write_text("a b")
    assert model_hash(str(copy)) != before
