"""Files of a model that are not what they should be: one sentence, which names the model and the file."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aligndistil.errors import UserError
from aligndistil.models import load_model, load_tokenizer
from aligndistil.recipe import Model


def with_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Path("x")}))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("[1, 2]"), "its config.json holds no JSON object"),
        (lambda folder: (folder / "config.json").write_text("7"), "its config.json holds no JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 5000), "its config.json holds no JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "its config.json holds no JSON object"),
        (lambda folder: with_config(folder, hidden_size="many"), "cannot be loaded"),
        (lambda folder: with_config(folder, vocab_size=7), "tensors of other shapes"),
        (pickled, "its pytorch_model.bin holds no weights, or more than tensors, which could run code"),
        (truncated, "cannot be loaded"),
    ],
)
def test_a_model_with_a_wrong_file_is_refused_in_one_sentence(
    damage: Callable[[Path], object], said: str, model_folder: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(seed=0), folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_model(str(folder), Model(path=str(folder)), trained=True)
    sentence = str(caught.value)
    assert said in sentence
    assert str(folder) in sentence
    assert "\n" not in sentence


def test_a_bin_file_of_tensors_is_loaded(model_folder: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(seed=0), folder)
    section = Model(path=str(folder))
    model = load_model(str(folder), section, trained=True)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    again = load_model(str(folder), section, trained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_tokenizer_with_a_wrong_file_is_refused(model_folder: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(seed=0), folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json holds no JSON object"):
        load_tokenizer(str(folder), Model(path=str(folder)))
