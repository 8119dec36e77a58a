"""A trained model is an ordinary Hugging Face folder: what was published, plus training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from aligndistil.batch import DataKind, Row, collate
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.files import partial_path
from aligndistil.models import export_model, load_model, load_scalar_model, stop_ids, text_part
from aligndistil.models.tokenizers import published_tokenizer
from aligndistil.models.weights import published_tensors
from aligndistil.recipe import Model
from support.models import CHAT, EOS, PAD, build_model, build_tokenizer

ModelFolder = Callable[..., str]


def exported(start: str, folder: Path, *, scalar: bool = False, moved: float = 0.01, **section: Any) -> Any:
    """Load a model as a stage does, move what is trained, and export it; the model."""
    options = Model.model_validate({"path": start, **section})
    model = (load_scalar_model if scalar else load_model)(start, options, trained=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved if parameter.requires_grad else 0.0)
    stops = stop_ids(start, options, published_tokenizer(start, options))
    export_model(model, dict(model.named_parameters()), start, options, stops, folder, "# A card\n")
    return model


def changes(start: str, end: Path) -> dict[str, Any]:
    """What tells two model folders apart, but for the values of tensors and the card; by file, fields that differ."""
    found: dict[str, Any] = {}
    names = {file.name for folder in (Path(start), end) for file in folder.iterdir()} - {"README.md"}
    for name in sorted(name for name in names if not name.endswith((".safetensors", ".bin", ".index.json"))):
        both = [folder / name for folder in (Path(start), end)]
        if not all(file.exists() for file in both):
            found[name] = "there" if both[0].exists() else "new"
        elif both[0].read_bytes() != both[1].read_bytes() and not name.endswith(".json"):
            found[name] = "other"
        elif both[0].read_bytes() != both[1].read_bytes():
            a, b = (json.loads(file.read_text()) for file in both)
            found[name] = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    before, after = published_tensors(start), published_tensors(str(end))
    names = before.keys() ^ after.keys()
    dtypes = {name for name in before.keys() & after.keys() if before[name].dtype != after[name].dtype}
    return found | ({"names": names} if names else {}) | ({"dtypes": dtypes} if dtypes else {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_model_is_loaded_by_transformers_and_generates(
    tied: bool, dtype: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    path = model_folder(seed=0, tied=tied)
    model = exported(path, tmp_path / "final", dtype=dtype, gradient_checkpointing=True)
    assert changes(path, tmp_path / "final") == {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=dtype)
    ids = torch.arange(5, 12).unsqueeze(0)
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert ("lm_head.weight" in load_file(tmp_path / "final" / "model.safetensors")) is not tied
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.chat_template == CHAT
    asked = again("<user> w01 <bot>", return_tensors="pt")
    assert loaded.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] <= 3 + 4
    assert (tmp_path / "final" / "README.md").read_text() == "# A card\n"
    assert model.config.use_cache is False


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "resid_pdrop": 0.1, "embd_pdrop": 0.3}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PUBLISHED: dict[str, dict[str, Any]] = {
    "dropout": {"kind": "gpt2", "config": {**GPT2, "attn_pdrop": 0.2}},
    "no padding token": {"kind": "gpt2", "config": GPT2, "tokenizer": {"pad_token": None}},
    "an end that pads": {"kind": "gpt2", "config": GPT2, "tokenizer": {"pad_token": "<eos>"}},
    "bfloat16": {
        "kind": "llama",
        "config": {**LLAMA, "vocab_size": 96, "attention_dropout": 0.2},
        "dtype": torch.bfloat16,
    },
    "float16": {"kind": "llama", "config": {**LLAMA, "vocab_size": 100}, "dtype": torch.float16},
    "mixed dtypes": {"kind": "llama", "config": {**LLAMA, "vocab_size": 96}, "dtype": torch.bfloat16, "kept": "norm"},
    "fields of nobody": {"kind": "llama", "config": {**LLAMA, "vocab_size": 96, "made_by": "us", "use_cache": False}},
    "experts": {
        "kind": "qwen3_moe",
        "config": {**LLAMA, "vocab_size": 96, "num_experts": 2, "moe_intermediate_size": 8},
    },
    "names of the body alone": {"kind": "gpt2", "config": GPT2, "without": "transformer."},
    "bin": {"kind": "llama", "config": {**LLAMA, "vocab_size": 96}, "bin": True},
}


def publish(folder: Path, about: dict[str, Any]) -> str:
    """A model folder as somebody published it."""
    ends = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(about["kind"], **ends, **about["config"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(about.get("dtype", torch.float32))
    model.save_pretrained(folder)
    if about.keys() & {"kept", "bin", "without"}:
        weights = load_file(folder / "model.safetensors")
        weights = {name: one.float() if about.get("kept", "?") in name else one for name, one in weights.items()}
        weights = {name.removeprefix(about.get("without", "")): one for name, one in weights.items()}
        if "bin" in about:
            (folder / "model.safetensors").unlink()
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = build_tokenizer()
    for name, value in about.get("tokenizer", {}).items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("about", PUBLISHED.values(), ids=PUBLISHED)
def test_what_was_published_is_in_the_export_as_it_was(about: dict[str, Any], tmp_path: Path) -> None:
    start = publish(tmp_path / "start", about)
    exported(start, tmp_path / "final")
    assert changes(start, tmp_path / "final") == {}
    before, after = published_tensors(start), published_tensors(str(tmp_path / "final"))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_of_another_dtype_than_it_is_trained_in_keeps_its_own(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    start = publish(tmp_path / "start", PUBLISHED["bfloat16"])
    exported(start, tmp_path / "final", moved=1.0)
    before, after = published_tensors(start), published_tensors(str(tmp_path / "final"))
    assert all(torch.equal(after[name], (before[name].float() + 1.0).bfloat16()) for name in before)


def test_a_chat_template_of_the_recipe_is_exported(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = model_folder(seed=0)
    exported(path, tmp_path / "final", chat_template="{{ messages[0].content }}")
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == "{{ messages[0].content }}"
    assert changes(path, tmp_path / "final") == {"chat_template.jinja": "other"}


@pytest.mark.parametrize("published", [True, False])
def test_generation_stops_where_training_stopped(published: bool, model_folder: ModelFolder, tmp_path: Path) -> None:
    """And samples as it was published, even with settings that transformers refuses to save."""
    start = Path(shutil.copytree(model_folder(seed=0), tmp_path / "start"))
    settings = {"temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": 1, "ours": None}
    if published:
        (start / "generation_config.json").write_text(json.dumps(settings))
    else:
        (start / "generation_config.json").unlink()
    options = Model(path=str(start))
    model = load_model(str(start), options, trained=True)
    export_model(model, model.state_dict(), str(start), options, frozenset({1, 9}), tmp_path / "final", "card")
    found = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 9]
    if published:
        assert found == {**settings, "eos_token_id": [1, 9]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config.eos_token_id == [1, 9]


COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {"image_size": 28, "patch_size": 14},
    "qwen3_5": {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
    "llama4": {
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
}


def compose(kind: str, folder: Path) -> Any:
    """A tiny model of text and images, with a file beside it that images are read with."""
    whole = transformers.AutoConfig.for_model(kind)
    sizes = {
        **LLAMA,
        "vocab_size": 96,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    known = whole.text_config.to_dict().keys()
    text = {name: value for name, value in sizes.items() if name in known}
    if kind == "qwen3_5":
        text["layer_types"] = ["linear_attention", "full_attention"]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**whole.vision_config.to_dict(), **vision, **COMPOSITE[kind]}
    config = type(whole)(text_config=type(whole.text_config)(**text).to_dict(), vision_config=vision)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    return model


@pytest.mark.parametrize("kind", COMPOSITE)
def test_of_a_composite_model_the_text_is_trained_and_the_rest_exported_as_it_came(kind: str, tmp_path: Path) -> None:
    whole = compose(kind, tmp_path / "start")
    start = str(tmp_path / "start")
    sentence = text_part(start, Model(path=start))
    assert sentence is not None
    assert f"its language model ({kind}_text) is trained; the rest (vision_config) is exported as it came" in sentence
    trained = exported(start, tmp_path / "final")
    assert changes(start, tmp_path / "final") == {}
    before, after = published_tensors(start), published_tensors(str(tmp_path / "final"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    others = {name for name in before if "vision" in name or "visual" in name or "multi_modal" in name}
    assert moved
    assert others
    assert not moved & others
    assert not before.keys() - moved - others
    again, found = type(whole).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not found["unexpected_keys"]
    assert not found["missing_keys"]
    ids = torch.arange(5, 15).unsqueeze(0)
    text = again.language_model if kind == "llama4" else again  # transformers' own Llama 4 fails on text alone
    ours = trained.eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(text.eval()(input_ids=ids, use_cache=False).logits, ours)


def test_another_part_of_a_composite_model_that_nothing_has_a_place_for_is_refused(tmp_path: Path) -> None:
    compose("llama4", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"has 1 tensors .* no place for: audio_tower"):
        load_model(str(tmp_path), Model(path=str(tmp_path)), trained=False)


def test_layers_that_the_class_ignores_come_back_untouched(tmp_path: Path) -> None:
    """Those that predict several tokens ahead, say, which transformers has no place for."""
    start = publish(
        tmp_path / "start",
        {
            "kind": "qwen3_next",
            "config": {
                **LLAMA,
                "vocab_size": 96,
                "num_experts": 2,
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
            },
        },
    )
    file = tmp_path / "start" / "model.safetensors"
    ahead = {"mtp.layers.0.weight": torch.randn(3, 3)}
    save_file(load_file(file) | ahead, file, metadata={"format": "pt"})
    exported(start, tmp_path / "final")
    assert changes(start, tmp_path / "final") == {}
    assert torch.equal(
        load_file(tmp_path / "final" / "model.safetensors")["mtp.layers.0.weight"], ahead["mtp.layers.0.weight"]
    )


@pytest.mark.parametrize("padding", ["<pad>", "<eos>", None])
@pytest.mark.parametrize("scalar", [True, False], ids=["from a reward model", "from a language model"])
def test_a_padded_batch_is_scored_by_transformers_as_here(scalar: bool, padding: str | None, tmp_path: Path) -> None:
    """Transformers scores the last token that is not padding: an end that pads would not be scored."""
    build_model(seed=0, scalar=scalar, attention_dropout=0.1).save_pretrained(tmp_path / "start")
    tokenizer = build_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = padding, "left"
    tokenizer.save_pretrained(tmp_path / "start")
    start = str(tmp_path / "start")
    model = exported(start, tmp_path / "final", scalar=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "final")
    texts = ["<user> w01 <bot> w02 w03 <eos>", "<user> w01 w02 w03 <bot> w05 <eos>", "<user> w07 <bot> <eos>"]
    batch = reader(texts, padding=True, return_tensors="pt")
    rows = [Row(ids[:-2], ids[-2:]) for ids in (reader(text)["input_ids"] for text in texts)]
    ours = ScalarModel(model).scores(collate(rows, DataKind.RESPONSES, PAD))
    last = torch.tensor([[len(row.prompt_ids) + len(row.response_ids) - 1] for row in rows])
    theirs = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(theirs, ours.gather(1, last), atol=1e-5)
    found = changes(start, tmp_path / "final")
    head = {"architectures", "id2label", "label2id"}
    assert found.pop("config.json", set()) <= (set() if scalar else head)
    assert found.pop("tokenizer_config.json", set()) <= {"pad_token", "padding_side", "backend"}
    assert found == ({} if scalar else {"generation_config.json": "there", "names": {"score.weight"}})
    assert (loaded.config.num_labels, loaded.config.attention_dropout, loaded.config.use_cache) == (1, 0.1, True)


def test_a_tokenizer_whose_tokens_may_all_end_a_text_pads_with_none(tmp_path: Path) -> None:
    """Transformers then asks for one text at a time, instead of scoring the wrong token."""
    build_model(seed=0, scalar=True).save_pretrained(tmp_path / "start")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "start")
    options = Model(path=str(tmp_path / "start"))
    model = load_scalar_model(options.path, options, trained=True)
    stops = frozenset(tokenizer.added_tokens_decoder)
    export_model(model, model.state_dict(), options.path, options, stops, tmp_path / "final", "card")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert loaded.config.pad_token_id is None
    with pytest.raises(ValueError, match="batch sizes > 1"):
        loaded(input_ids=torch.tensor([[5, 6, 1], [5, 6, 1]]))


def test_an_export_replaces_what_an_interrupted_one_left(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = model_folder(seed=0)
    for left in (tmp_path / "final", partial_path(tmp_path / "final")):
        left.mkdir()
        (left / "half-written").write_text("")
    exported(path, tmp_path / "final")
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "half-written").exists()
