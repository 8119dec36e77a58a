"""How rows are laid out for a model changes no number: a few at a time, without a mask, pairs with one prompt."""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.rows import Body
from aligndistil.engine.scalar import ScalarNetwork
from support.micro_batches import ragged_batch
from support.models import build_model


def hidden(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    return Body(model).response_states


def values(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    network = ScalarNetwork(model)
    return lambda batch: network(batch) * batch.attention_BT


@pytest.mark.parametrize(("rows", "passed"), [(2, [2, 2, 1]), (3, [3, 2]), (4, [4, 1])])
@pytest.mark.parametrize(("build", "reading"), [(build_model, hidden), (partial(build_model, scalar=True), values)])
def test_rows_that_are_read_a_few_at_a_time_give_the_same_numbers_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., Any],
    reading: Callable[[PreTrainedModel], Callable[[Batch], Tensor]],
    rows: int,
    passed: list[int],
) -> None:
    model, batch = build(seed=1).eval(), ragged_batch(DataKind.RESPONSES, examples=5)
    lengths = batch.attention_BT.sum(-1)
    assert not lengths.equal(lengths.sort().values)
    width = batch.ids_BT.shape[1] * model.config.hidden_size
    read, passes = reading(model), list[int]()
    model.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    with torch.no_grad():
        monkeypatch.setattr("aligndistil.engine.rows._CPU_STATES", 5 * width)
        whole = read(batch)
        monkeypatch.setattr("aligndistil.engine.rows._CPU_STATES", rows * width)
        parts = read(batch)
    assert passes == [5, *passed]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def pairs(seed: int = 0, examples: int = 4, shortest: int = 6) -> Batch:
    """With prompts so long that it pays to read them once."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(5, 90) for _ in range(count)]

    rows = []
    for _ in range(examples):
        prompt = tokens(draw.randint(shortest, 30))
        rows += [Row(prompt, tokens(draw.randint(1, 5))), Row(prompt, tokens(draw.randint(1, 5)))]
    return collate(rows, DataKind.PAIRS, 0)


def positions_read(model: PreTrainedModel) -> list[int]:
    """Tokens, padding included, of each pass from now on."""
    read = list[int]()
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append((args[0] if args else given["input_ids"]).numel()), with_kwargs=True
    )
    return read


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 1, "intermediate_size": 48}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 1, "intermediate_size": 48}),
    "gpt2": (GPT2Config, {"n_positions": 64, "n_inner": 48}),
    "gpt_neox": (GPTNeoXConfig, {"intermediate_size": 48}),
}


def tiny(config: Any, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(config(**sizes, **settings)).double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_read_once_gives_the_same_states_and_gradients(family: str) -> None:
    config, settings = FAMILIES[family]
    model, batch = tiny(config, **settings), pairs()
    found = []
    for share in (False, True):
        model.zero_grad()
        body = Body(model, share_prompts=share)
        read = positions_read(model)
        states = body.response_states(batch)
        weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
        (states * weights).sum().backward()
        found.append((states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (_, plain), (_, shared) = found
    assert sum(read) < 0.7 * batch.ids_BT.numel()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    assert plain.keys() == shared.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_scalar_heads_read_a_prompt_once_too() -> None:
    model, batch = build_model(seed=1, scalar=True).eval(), pairs()
    plain, read = ScalarNetwork(model)(batch), positions_read(model)
    shared = ScalarNetwork(model, share_prompts=True)(batch)
    assert read[-1] < 0.7 * batch.ids_BT.numel()
    torch.testing.assert_close(shared[batch.attention_BT], plain[batch.attention_BT], rtol=1e-5, atol=1e-6)


def test_pairs_are_read_apart_where_little_of_them_is_prompt_or_prompts_differ() -> None:
    model = tiny(LlamaConfig, intermediate_size=48)
    body, read = Body(model, share_prompts=True), positions_read(model)
    long = collate([Row([5], [6] * 40), Row([5], [7] * 40)], DataKind.PAIRS, 0)
    others = collate([Row([5] * 30, [6]), Row([8] * 30, [7])], DataKind.PAIRS, 0)
    singles = collate([Row([5] * 30, [6]), Row([5] * 30, [7])], DataKind.RESPONSES, 0)
    for batch in (long, others, singles):
        body.response_states(batch)
        assert read[-1] == batch.ids_BT.numel()
    body.response_states(collate([Row([5] * 30, [6]), Row([5] * 30, [7])], DataKind.PAIRS, 0))
    assert read[-1] == 32


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        (MistralConfig, {"sliding_window": 8, "num_key_value_heads": 1}, "sliding"),
        (Gemma2Config, {"sliding_window": 8, "head_dim": 16, "num_key_value_heads": 1}, "sliding_attention"),
        (BloomConfig, {}, "takes no mask of its own|would differ"),
        (MambaConfig, {}, "layers of the kind linear_attention"),
    ],
)
def test_models_that_cannot_share_a_prompt_say_why_and_read_it_twice(
    config: Any, settings: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="aligndistil"):
        body = Body(model := tiny(config, **settings), share_prompts=True)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "chosen and rejected are read with a prompt each" in line
    assert re.search(why, line), line
    read, batch = positions_read(model), pairs()
    body.response_states(batch)
    assert read == [batch.ids_BT.numel()]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_padding_mask_is_given_and_padding_changes_nothing(family: str) -> None:
    config, settings = FAMILIES[family]
    model, given = tiny(config, **settings), list[Any]()
    batch = ragged_batch(DataKind.RESPONSES, examples=5)
    expected = model.base_model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).last_hidden_state
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    states, places = Body(model).states(batch)
    assert places is None
    assert given == [None]
    real = batch.attention_BT
    torch.testing.assert_close(states.view_as(expected)[real], expected[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_positions_tell_apart_stand_in_one_without_padding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flash attention reads them; sdpa makes a mask of the positions, on a CPU too."""
    config, settings = FAMILIES[family]
    batch = ragged_batch(DataKind.RESPONSES, examples=5)
    model = tiny(config, **settings)
    padded = Body(model).response_states(batch)
    monkeypatch.setattr("aligndistil.engine.rows._BY_POSITIONS", ("sdpa",))
    body = Body(model)
    read = positions_read(model)
    packed = body.response_states(batch)
    assert read == [batch.tokens]
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)


def test_a_model_that_does_not_tell_texts_apart_by_positions_is_given_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aligndistil.engine.rows._BY_POSITIONS", ("eager", "sdpa", None))
    with caplog.at_level(logging.INFO, logger="aligndistil"):
        body = Body(model := tiny(MambaConfig))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "rows are padded: " in line
    read, batch = positions_read(model), pairs()
    body.response_states(batch)
    assert read == [batch.ids_BT.numel()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled")
def test_the_kernels_of_a_gpu_give_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient, which FlexAttention has on a GPU alone."""
    monkeypatch.setattr("aligndistil.engine.rows._has_flex_attention", lambda device: True)
    model = build_model(seed=1).eval().requires_grad_(False)
    batch = pairs(examples=2)
    plain = Body(model).response_states(batch)
    body = Body(model, share_prompts=True)
    read = positions_read(model)
    torch.testing.assert_close(body.response_states(batch), plain, rtol=1e-5, atol=1e-5)
    assert read[0] < 0.7 * batch.ids_BT.numel()
    assert model.config._attn_implementation == "sdpa"


def test_kernels_without_a_backward_pass_are_not_trained_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aligndistil.engine.rows._has_flex_attention", lambda device: True)
    with caplog.at_level(logging.INFO, logger="aligndistil"):
        Body(build_model(seed=1), share_prompts=True)
    assert "does not support backward" in caplog.text


def as_sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **more: Any) -> Any:
    """What FlexAttention computes, by sdpa and a mask: with a backward pass on a CPU."""
    sees = create_mask(mask.mask_mod, query.shape[0], None, query.shape[2], key.shape[2], device="cpu")
    return sdpa_attention_forward(module, query, key, value, sees, **more)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_computed_again_are_given_the_same_mask(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligndistil.engine.rows._has_flex_attention", lambda device: True)
    monkeypatch.setattr("aligndistil.engine.rows._flex_attention", as_sdpa)
    batch, found = pairs(examples=2), []
    for share in (False, True):
        model = build_model(seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        body = Body(model, share_prompts=share)
        read = positions_read(model)
        states = body.response_states(batch)
        states.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((states.detach(), gradients))
    assert read[0] < 0.7 * batch.ids_BT.numel()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_an_attention_that_the_recipe_asks_for_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aligndistil.engine.rows._has_flex_attention", lambda device: True)
    model = build_model(seed=1)
    model.config._attn_implementation = "eager"
    with caplog.at_level(logging.INFO, logger="aligndistil"):
        Body(model, share_prompts=True)
    assert "its attention is eager, which the recipe asks for" in caplog.text
