"""A trained model is an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from aligndistil.files import partial_path
from aligndistil.models import export_model, load_model, load_scalar_model, load_tokenizer
from aligndistil.recipe import Model
from support.models import CHAT

ModelFolder = Callable[..., str]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_model_is_loaded_by_transformers_and_generates(
    tied: bool, dtype: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    path = model_folder(seed=0, tied=tied)
    section = Model.model_validate({"path": path, "dtype": dtype, "gradient_checkpointing": True})
    model, tokenizer = load_model(path, section, trained=True), load_tokenizer(path, section)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    export_model(model, state, tokenizer, frozenset({1, 9}), tmp_path / "final", "# A card\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.dtype == model.dtype
    ids = torch.arange(5, 12).unsqueeze(0)
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert ("lm_head.weight" in load_file(tmp_path / "final" / "model.safetensors")) is not tied
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == CHAT
    asked = again("<user> w01 <bot>", return_tensors="pt")
    assert loaded.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] <= 3 + 4
    assert (tmp_path / "final" / "README.md").read_text() == "# A card\n"


def test_the_exported_settings_stop_where_training_stopped_and_use_the_cache(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    path = model_folder(seed=0)
    section = Model(path=path)
    model, tokenizer = load_model(path, section, trained=True), load_tokenizer(path, section)
    # As some models are published: a temperature, and no sampling.
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, repetition_penalty=1.1, eos_token_id=1)
    export_model(model, model.state_dict(), tokenizer, frozenset({1, 9}), tmp_path / "final", "card")
    settings = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 9]
    assert settings["pad_token_id"] == 0
    assert settings["repetition_penalty"] == 1.1
    assert json.loads((tmp_path / "final" / "config.json").read_text())["use_cache"] is True
    assert model.config.use_cache is False


@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
def test_a_scalar_model_says_which_padding_its_scores_look_for(
    padding: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    """An end that pads would be taken for padding, and the token before it scored."""
    path = model_folder(seed=0, scalar=True)
    section = Model(path=path)
    model, tokenizer = load_scalar_model(path, section, trained=True), load_tokenizer(path, section)
    tokenizer.pad_token = padding
    export_model(model, model.state_dict(), tokenizer, frozenset({1, 9}), tmp_path / "final", "card")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert loaded.config.pad_token_id == (0 if padding == "<pad>" else None)
    assert loaded.config.use_cache is True
    assert (loaded.config.num_labels, list(loaded(input_ids=torch.tensor([[5, 6, 1]])).logits.shape)) == (1, [1, 1])
    assert not (tmp_path / "final" / "generation_config.json").exists()


def test_an_export_replaces_what_an_interrupted_one_left(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = model_folder(seed=0)
    section = Model(path=path)
    model, tokenizer = load_model(path, section, trained=True), load_tokenizer(path, section)
    for left in (tmp_path / "final", partial_path(tmp_path / "final")):
        left.mkdir()
        (left / "half-written").write_text("")
    export_model(model, model.state_dict(), tokenizer, frozenset({1}), tmp_path / "final", "card")
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "half-written").exists()
