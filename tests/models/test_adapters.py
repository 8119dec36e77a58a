"""Adapter folders: PEFT reads what we write and we read what PEFT writes, to 1e-5; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aligndistil import recipe
from aligndistil.errors import MissingError, UserError
from aligndistil.models import (
    Bases,
    adapter_at,
    check_lora,
    check_weights,
    export_adapter,
    load_model,
    load_scalar_model,
    load_tokenizer,
    model_hash,
)
from aligndistil.models.adapters import layers_of, target_modules
from support.adapters import write_adapter
from support.engines import section

ModelFolder = Callable[..., str]
IDS = torch.tensor([[5, 9, 33, 60, 7, 20, 1]])
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(model_folder: ModelFolder) -> str:
    return model_folder(seed=0)


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("adapter"), base, seed=1)


@pytest.fixture(scope="module")
def scoring(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("scoring"), base, seed=2, scalar=True)


def with_lora(path: str, **lora: Any) -> recipe.Model:
    return section(path, lora={**LORA, **lora})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@torch.no_grad()
def by_peft(base: str, folder: str | Path, scalar: bool = False) -> torch.Tensor:
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32, **({"num_labels": 1} if scalar else {}))
    return logits(PeftModel.from_pretrained(model, folder))


def test_an_adapter_of_peft_gives_the_same_logits_merged_shared_and_in_peft(base: str, adapter: str) -> None:
    merged = load_model(adapter, section(adapter), trained=False)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    bases = Bases(with_lora(base))
    policy, shared = bases.language_model(adapter, trained=True), bases.language_model(adapter)
    expected = by_peft(base, adapter)
    for model in (merged, policy, shared):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert float((expected - logits(load_model(base, section(base), trained=False))).abs().max()) > 0.1


def test_a_scoring_adapter_of_peft_gives_the_same_scores(base: str, scoring: str) -> None:
    """With a scalar head of its own, on a base that a language model shares."""
    expected = by_peft(base, scoring, scalar=True)
    bases = Bases(with_lora(base))
    policy, reward = bases.language_model(base, trained=True), bases.scalar_model(scoring)
    critic = bases.scalar_model(scoring, trained=True)
    merged = load_scalar_model(scoring, section(scoring), trained=False)
    for model in (reward, critic, merged):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert reward.model.embed_tokens.weight is policy.model.embed_tokens.weight is critic.model.embed_tokens.weight
    assert critic.score.weight.requires_grad
    assert not reward.score.weight.requires_grad
    assert critic.score.weight is not reward.score.weight


@pytest.mark.parametrize("scalar", [False, True])
def test_peft_loads_what_is_exported_and_so_does_the_package(base: str, scalar: bool, tmp_path: Path) -> None:
    options, bases = with_lora(base), Bases(with_lora(base), seed=3)
    model = (bases.scalar_model if scalar else bases.language_model)(base, trained=True)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.config.score_mean, model.config.score_std = 0.25, 2.0
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export_adapter(model, state, base, options, frozenset({1}), tmp_path / "final", "# card\n")
    written = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= written
    assert ("config.json" in written) is scalar
    assert "model.safetensors" not in written
    torch.testing.assert_close(by_peft(base, tmp_path / "final", scalar), logits(model), atol=1e-5, rtol=1e-5)
    final = str(tmp_path / "final")
    again = (load_scalar_model if scalar else load_model)(final, section(final), trained=False)
    torch.testing.assert_close(logits(again), logits(model), atol=5e-5, rtol=1e-5)  # sums in another order
    check_weights(final, section(final), scalar=scalar, trained=False)
    assert len(load_tokenizer(final, section(final))) == 96
    if scalar:
        assert (again.config.score_mean, again.config.score_std) == (0.25, 2.0)
        shared = Bases(options).scalar_model(final)
        assert (shared.config.score_mean, shared.config.score_std) == (0.25, 2.0)


def test_the_same_seed_draws_the_same_adapter_whatever_was_drawn_before(base: str) -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = Bases(with_lora(base), seed).language_model(base, trained=True)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    first = drawn(0)
    torch.rand(3)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


def test_all_linear_is_the_body_without_the_head(base: str, model_folder: ModelFolder) -> None:
    lora = recipe.Lora()
    for path in (base, model_folder(seed=0, tied=False)):
        model = load_model(path, section(path), trained=False)
        ends = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert set(target_modules(model, lora)) == ends
        assert len(layers_of(model)) == 2 * 7


def test_layers_of_gpt2_are_found_and_a_name_that_others_have_too_is_written_whole() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    assert set(target_modules(model, recipe.Lora())) == {"c_attn", "c_proj", "c_fc"}
    model.transformer.h[0].mlp.lm_head = torch.nn.Linear(32, 32)
    assert "transformer.h.0.mlp.lm_head" in target_modules(model, recipe.Lora())


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["q_pro"], "no layer is called `q_pro`; did you mean `q_proj`?"),
        (["q_proj", "lm_head"], "`lm_head` is lm_head, which is no linear layer of the body"),
        (["embed_tokens"], "`embed_tokens` is model.embed_tokens, which is no linear layer of the body"),
        (["mlp"], "`mlp` is model.layers.0.mlp, which is no linear layer of the body"),
    ],
)
def test_target_modules_that_can_have_no_adapter_are_refused(base: str, modules: list[str], said: str) -> None:
    options = with_lora(base, target_modules=modules)
    for refuse in (
        lambda: check_lora(base, options, scalar=False),
        lambda: Bases(options).language_model(base, trained=True),
    ):
        with pytest.raises(UserError) as found:
            refuse()
        assert said in str(found.value)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 8}, "which has r: 4 and not 8"),
        ({"alpha": 16}, "which has lora_alpha: 8 and not 16.0"),
        ({"target_modules": ["q_proj"]}, "which has other layers"),
    ],
)
def test_an_adapter_is_trained_further_only_as_it_is(adapter: str, lora: dict[str, Any], said: str) -> None:
    options = with_lora(adapter, **lora)
    with pytest.raises(UserError, match=said):
        Bases(options).language_model(adapter, trained=True)
    with pytest.raises(UserError, match=said):
        check_lora(adapter, options, scalar=False)
    check_lora(adapter, with_lora(adapter), scalar=False)


def test_what_is_no_whole_adapter_is_refused_in_a_sentence(
    base: str, adapter: str, scoring: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    def copied(name: str, **config: Any) -> str:
        folder = shutil.copytree(adapter, tmp_path / name)
        written = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**written, **config}))
        return str(folder)

    cases = {
        copied("lost", base_model_name_or_path=str(tmp_path / "nowhere")): "has lost its base",
        copied("nameless", base_model_name_or_path=None): "names no base",
        copied("ranked", r=8): "does not fit its base",
        copied("fewer", target_modules=["q_proj"]): "for which its base",
        copied("wider", base_model_name_or_path=model_folder(seed=0, hidden_size=64)): "does not fit its base",
        copied("other", peft_type="IA3", feedforward_modules=[]): "of the kind IA3",
    }
    for path, said in cases.items():
        with pytest.raises(UserError, match=said):
            load_model(path, section(path), trained=False)
    lost = str(tmp_path / "lost")
    with pytest.raises(UserError, match=r"has lost its base, which its adapter_config\.json names"):
        load_tokenizer(lost, section(lost))
    with pytest.raises(UserError, match="scores nothing"):
        load_scalar_model(adapter, section(adapter), trained=False)
    with pytest.raises(UserError, match="scores nothing"):
        Bases(with_lora(base)).scalar_model(adapter)


def test_the_hash_of_an_adapter_is_of_its_base_too_wherever_that_lies(
    adapter: str, model_folder: ModelFolder, base: str, tmp_path: Path
) -> None:
    def on(other: str, name: str) -> str:
        folder = shutil.copytree(adapter, tmp_path / name)
        written = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": other}))
        return str(folder)

    moved = str(shutil.copytree(base, tmp_path / "moved"))
    assert model_hash(on(moved, "same")) == model_hash(adapter)
    assert model_hash(on(model_folder(seed=4), "another")) != model_hash(adapter)


def test_adapters_without_peft_say_what_to_install(base: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    for use in (lambda: adapter_at(adapter), lambda: check_lora(base, with_lora(base), scalar=False)):
        with pytest.raises(MissingError, match=r"pip install aligndistil\[lora\]"):
            use()
