"""Models that load, without dropout; and those that do not, in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from aligndistil.errors import EXIT_SERVICE, MissingError, ServiceError, UserError
from aligndistil.models import (
    builtin_model,
    check_weights,
    load_model,
    load_scalar_model,
    model_exists,
    pick_dtype,
)
from aligndistil.recipe import Model
from support.models import build_model

ModelFolder = Callable[..., str]


def section(path: str, **fields: Any) -> Model:
    return Model.model_validate({"path": path, **fields})


@pytest.fixture
def copy(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(model_folder(seed=0, tied=False), tmp_path / "model"))


def test_a_model_trains_without_dropout(tmp_path: Path) -> None:
    dropouts = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, **dropouts)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), section(str(tmp_path)), trained=True).train()
    ids = torch.arange(5, 15).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_layers_are_not_dropped_either(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=96, num_attention_heads=2, layerdrop=0.9, dropout=0.5, **sizes)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), section(str(tmp_path)), trained=True)
    assert (model.config.layerdrop, model.config.dropout) == (0.0, 0.0)


@pytest.mark.parametrize(("dtype", "found"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_recipe_decides_the_dtype(dtype: str, found: torch.dtype, model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    assert load_model(path, section(path, dtype=dtype), trained=False).dtype == found


@pytest.mark.parametrize(
    ("cuda", "amx", "hidden", "dtype"),
    [
        (True, False, 64, torch.bfloat16),
        (False, False, 4096, torch.float32),
        (False, True, 576, torch.bfloat16),
        (False, True, 128, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_that_is_fast(
    cuda: bool, amx: bool, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("aligndistil.models.load._has_amx", lambda: amx)
    assert pick_dtype("auto", hidden) == dtype
    assert pick_dtype("float32", hidden) == torch.float32


def test_only_the_trained_model_checkpoints_its_activations(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    asked = section(path, gradient_checkpointing=True)
    assert load_model(path, asked, trained=True).is_gradient_checkpointing
    assert not load_model(path, asked, trained=False).is_gradient_checkpointing


def test_attention_may_be_chosen(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    model = load_model(path, section(path, attn_implementation="eager"), trained=False)
    assert model.config._attn_implementation == "eager"


def test_an_attention_whose_package_is_not_installed_is_missing(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    if torch.cuda.is_available():
        pytest.skip("flash attention may be here")
    with pytest.raises(MissingError, match=r"needs a package that is not installed: FlashAttention"):
        load_model(path, section(path, attn_implementation="flash_attention_2"), trained=False)


def test_the_embedded_model_is_a_folder_of_the_package() -> None:
    folder = Path(builtin_model("builtin:tiny"))
    assert (folder / "config.json").is_file()
    assert builtin_model("./mine") == "./mine"
    with pytest.raises(UserError, match=r"model 'builtin:huge' is not embedded in the package; there is builtin:tiny"):
        model_exists("builtin:huge")


def test_a_missing_folder_is_refused_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(UserError, match=r"smolm2' does not exist; did you mean .*smollm2'\?"):
        model_exists(str(tmp_path / "smolm2"))
    with pytest.raises(UserError, match=r"nothing_like_it' does not exist; give a folder, a Hub id or builtin:tiny"):
        model_exists("./nothing_like_it")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json; give the folder that save_pretrained wrote"):
        model_exists(str(tmp_path))


def test_the_name_of_a_hub_model_is_not_looked_up_at_the_door() -> None:
    model_exists("Qwen/Qwen2.5-0.5B")


def test_a_hub_model_that_cannot_be_reached_is_a_fault_of_the_service() -> None:
    with pytest.raises(ServiceError, match=r"no local folder and the Hugging Face Hub cannot be reached") as caught:
        load_model("nobody/has-this-model", section("nobody/has-this-model"), trained=False)
    assert caught.value.exit_code == EXIT_SERVICE
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_drawn_at_random(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, model.layers.1.mlp.up_proj.weight for one"):
        load_model(str(copy), section(str(copy)), trained=False)


def test_tied_weights_are_not_missing(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0, tied=True)
    assert "lm_head.weight" not in load_file(Path(path) / "model.safetensors")
    model = load_model(path, section(path), trained=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("spoil", ["cut", "gone", "no json", "unknown"])
def test_a_damaged_folder_is_one_sentence(spoil: str, copy: Path) -> None:
    if spoil == "cut":
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
    elif spoil == "gone":
        (copy / "model.safetensors").unlink()
    elif spoil == "no json":
        (copy / "config.json").write_text("{")
    else:
        (copy / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(UserError, match=r"cannot be loaded by transformers \d") as caught:
        load_model(str(copy), section(str(copy)), trained=False)
    assert "\n" not in str(caught.value)


def test_a_new_scalar_head_is_drawn_by_the_seed_alone(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    heads = []
    for noise, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(noise)
        model = load_scalar_model(path, section(path), trained=True, seed=seed)
        heads.append(model.score.weight.detach())
    assert heads[0].shape == (1, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.15 < float(heads[0].std()) < 0.5  # the initializer_range of these models is 0.3
    body = load_model(path, section(path), trained=False).model
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.model.parameters(), body.parameters(), strict=True)
    )


def test_a_scalar_head_that_is_there_is_kept(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0, scalar=True)
    saved = load_file(Path(path) / "model.safetensors")["score.weight"]
    for trained in (True, False):
        model = load_scalar_model(path, section(path, gradient_checkpointing=True), trained=trained, seed=5)
        assert torch.equal(model.score.weight, saved)
        assert model.is_gradient_checkpointing is trained
        assert model.config.use_cache is False


def test_a_scalar_model_has_no_dropout_either(tmp_path: Path) -> None:
    dropouts = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, **dropouts)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), section(str(tmp_path)), trained=True).train()
    ids = torch.arange(5, 15).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_frozen_reward_needs_a_trained_head(model_folder: ModelFolder) -> None:
    path = model_folder(seed=0)
    with pytest.raises(UserError, match=r"lacks score.weight, which transformers would draw at random; give a model"):
        load_scalar_model(path, section(path), trained=False)


def test_weights_of_the_body_of_a_scalar_model_are_not_drawn_either(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(seed=0, scalar=True), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for trained in (True, False):
        with pytest.raises(UserError, match=r"lacks model.layers.1.mlp.up_proj.weight, which transformers would draw"):
            load_scalar_model(str(folder), section(str(folder)), trained=trained)


@pytest.mark.parametrize("trained", [True, False])
def test_a_classifier_with_several_outputs_is_no_scorer(
    trained: bool, model_folder: ModelFolder, tmp_path: Path
) -> None:
    AutoModelForSequenceClassification.from_pretrained(model_folder(seed=0), num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a classifier with 3 outputs, and a score is one number") as caught:
        load_scalar_model(str(tmp_path), section(str(tmp_path)), trained=trained)
    assert "\n" not in str(caught.value)


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_an_architecture_without_a_scalar_head_is_one_sentence(tmp_path: Path) -> None:
    config = CohereConfig(num_key_value_heads=1, eos_token_id=1, bos_token_id=2, **SIZES)
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded by") as caught:
        load_scalar_model(str(tmp_path), section(str(tmp_path)), trained=True)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Change the tensors of a model folder; its path."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def both_ways(path: str, *, scalar: bool, trained: bool) -> list[str]:
    """What loading says, and what is said of the tensors before they are read; empty where nothing is wrong."""
    load = load_scalar_model if scalar else load_model
    said = []
    for one in (
        lambda: load(path, section(path), trained=trained),
        lambda: check_weights(path, section(path), scalar=scalar, trained=trained),
    ):
        try:
            one()
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("scalar", "more", "named"),
    [
        (False, ["lm_head.bias"], "lm_head.bias"),
        (False, ["score.weight"], "score.weight"),
        (False, ["v_head.summary.weight", "v_head.summary.bias"], "v_head.summary.bias, v_head.summary.weight"),
        (
            False,
            [f"model.layers.{i}.self_attn.q_norm.weight" for i in range(5)],
            "layers.2.self_attn.q_norm.weight ...",
        ),
        (True, ["score.bias"], "score.bias"),
        (True, ["lm_head.weight", "lm_head.bias"], "lm_head.bias"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_tensors_without_a_place_are_refused(
    scalar: bool, more: list[str], named: str, trained: bool, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder(seed=0, tied=False, scalar=scalar), tmp_path / "model"))
    path = edit(folder, lambda weights: weights.update({name: torch.ones(1) for name in more}))
    left = [name for name in more if not (scalar and name == "lm_head.weight")]
    said = both_ways(path, scalar=scalar, trained=trained)
    assert said[0] == said[1]
    assert f"has {len(left)} tensors that Llama" in said[0]
    assert f"(model_type llama) has no place for: {left[0] if len(left) == 1 else ''}" in said[0]
    assert named in said[0]


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": 8},  # a buffer of older versions
        {"lm_head.weight": 96 * 32},
    ],
)
def test_tensors_that_transformers_declares_ignorable_and_replaced_heads_are_let_be(
    more: dict[str, int], model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder(seed=0, scalar=True), tmp_path / "model"))
    path = edit(folder, lambda weights: weights.update({name: torch.ones(size) for name, size in more.items()}))
    assert both_ways(path, scalar=True, trained=False) == []


def test_missing_weights_are_seen_before_any_is_read(copy: Path) -> None:
    path = edit(copy, lambda weights: weights.pop("lm_head.weight"))
    first, second = both_ways(path, scalar=False, trained=True)
    assert first == second
    assert "lacks 1 of its weights, lm_head.weight for one" in first


@pytest.mark.parametrize("form", ["shards", "bin", "old shards"])
def test_weights_in_other_files_are_checked_too(form: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    model = build_model(seed=0, tied=False)
    weights = {**model.state_dict(), "lm_head.bias": torch.ones(96)}
    for kept, name in ((model.state_dict(), "whole"), (weights, "extra")):
        folder = Path(shutil.copytree(model_folder(seed=0, tied=False), tmp_path / name))
        (folder / "model.safetensors").unlink()
        parts = [dict(list(kept.items())[::2]), dict(list(kept.items())[1::2])]
        stem, ending = ("model", "safetensors") if form == "shards" else ("pytorch_model", "bin")
        places = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
        if form == "bin":
            torch.save(kept, folder / "pytorch_model.bin")
        else:
            for place, part in zip(places, parts, strict=True):
                save_file(part, folder / place) if form == "shards" else torch.save(part, folder / place)
            index = {key: place for place, part in zip(places, parts, strict=True) for key in part}
            (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        said = both_ways(str(folder), scalar=False, trained=True)
        assert len(said) == (2 if name == "extra" else 0)
        assert all("lm_head.bias" in one for one in said)


def test_random_weights_are_the_same_every_time() -> None:
    a, b = build_model(seed=5), build_model(seed=5)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
