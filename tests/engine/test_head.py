"""A head is measured: what a model does to hidden states is found by running it, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from aligndistil.engine.head import Head, backbone
from aligndistil.errors import UserError
from support.models import build_model

VOCAB = 96
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Finishing(LlamaForCausalLM):
    """Does something to its logits that no field of its configuration says."""

    finish: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.finish(output.logits)
        return output


def made(kind: type[PreTrainedModel] = LlamaForCausalLM, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(build_model(**settings).config).to(dtype).eval()


def finishing(finish: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, bias: bool = False) -> Any:
    model = made(Finishing, dtype, tied=False)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCAB).to(dtype))
    model.finish = finish
    return model


def capped(cap: float, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda logits: cap * torch.tanh(scale * logits / cap)


def refused(model: Any, why: str) -> None:
    with pytest.raises(UserError, match=rf"\({type(model).__name__}\) .*{why}.*docs/families.md"):
        Head.of(model, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize(
    ("finish", "scale", "cap"),
    [
        (lambda logits: logits, 1.0, None),
        (lambda logits: logits.float(), 1.0, None),
        (lambda logits: logits / 2, 0.5, None),
        (lambda logits: logits * -3.0, -3.0, None),
        (lambda logits: logits * 0.011048543456039804, 0.011048543456039804, None),
        (lambda logits: logits * 40, 40.0, None),
        (capped(30.0), 1.0, 30.0),
        (capped(1.5), 1.0, 1.5),
        (capped(7.0, 0.0625), 0.0625, 7.0),
        (capped(100.0, 12.0), 12.0, 100.0),
    ],
    ids=["plain", "float32", "half", "negative", "small", "large", "cap", "low cap", "factor and cap", "both large"],
)
def test_factor_and_cap_are_measured(
    finish: Callable[[Tensor], Tensor], scale: float, cap: float | None, bias: bool, dtype: torch.dtype
) -> None:
    model = finishing(finish, dtype, bias)
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    head = Head.of(model, VOCAB)
    assert head.scale == pytest.approx(scale, rel=1e-5)
    assert head.softcap == (None if cap is None else pytest.approx(cap, rel=1e-5))
    assert (head.is_plain, head.scale == 1.0) == (scale == 1.0 and cap is None, scale == 1.0)
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert "forward" not in model.model.__dict__
    hidden = torch.randn(5, 32).to(model.dtype)
    wide = model.lm_head.weight.double(), None if model.lm_head.bias is None else model.lm_head.bias.double()
    expected = finish(nn.functional.linear(hidden.double(), *wide))
    torch.testing.assert_close(head.finish(head.project(hidden)).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_number_of_the_configuration_is_taken_for_what_was_measured() -> None:
    """They are the same but for rounding, and results do not change where the factor was read before."""
    for number, factor in ((3.0, 1 / 3.0), (0.011048543456039804, 0.011048543456039804)):
        model = finishing(lambda logits, factor=factor: logits * factor)
        assert Head.of(model, VOCAB).scale != pytest.approx(factor, rel=0, abs=0)
        model.config.some_name = {"nested": [number]}
        assert Head.of(model, VOCAB).scale == factor


@pytest.mark.parametrize(
    "finish",
    [
        lambda logits: logits.clamp(-3, 3),
        lambda logits: logits + 0.01 * logits**2,
        lambda logits: logits + torch.linspace(0, 1, VOCAB),
        lambda logits: logits - 0.001 * torch.arange(VOCAB),
        lambda logits: logits * torch.linspace(0.9, 1.1, VOCAB),
        lambda logits: logits.softmax(-1),
        lambda logits: 30 * torch.sin(logits / 30),
    ],
    ids=["clamp", "square", "other bias", "small bias", "factors", "softmax", "sine"],
)
def test_logits_that_are_made_otherwise_are_refused(finish: Callable[[Tensor], Tensor]) -> None:
    refused(finishing(finish), "makes its logits otherwise than as head")


class Headed(LlamaForCausalLM):
    """Keeps a transform between its body and its head, as BERT does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        output.logits = self.lm_head(self.transform(states))
        return output


def test_what_stands_between_body_and_head_is_measured_or_refused() -> None:
    model = made(Headed)
    refused(model, r"has weights beside its body and head that change its logits \(transform.weight\)")
    model.transform.requires_grad_(False)
    refused(model, "makes its logits otherwise")
    with torch.no_grad():
        model.transform.weight.copy_(0.25 * torch.eye(32))
        model.transform.bias.zero_()
    assert Head.of(model, VOCAB).scale == 0.25


class Learning(LlamaForCausalLM):
    """Learns a factor on its logits."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = nn.Parameter(torch.full((), 0.5))
        self.unused = nn.Linear(3, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.factor * output.logits
        return output


def test_a_factor_that_is_learnt_is_refused_and_one_that_is_frozen_is_not() -> None:
    model = made(Learning)
    refused(model, r"has weights beside its body and head that change its logits \(factor\)")
    model.factor.requires_grad_(False)
    assert Head.of(model, VOCAB).scale == 0.5
    model.requires_grad_(False)
    model.unused.requires_grad_(True)
    assert Head.of(model, VOCAB).scale == 0.5


class Prefixed(LlamaForCausalLM):
    base_model_prefix = "lm_head"


class Bodiless(LlamaForCausalLM):
    """Its layers are its own children."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens, self.layers, self.norm = self.model.embed_tokens, self.model.layers, self.model.norm
        parts, self.model = self.model, None
        object.__setattr__(self, "parts", parts)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        output = self.parts(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = self.lm_head(output.last_hidden_state)
        return output


def test_the_body_is_the_child_that_holds_the_embeddings_whatever_it_is_called() -> None:
    model = made(Prefixed)
    assert backbone(model) is model.model
    assert Head.of(model, VOCAB).is_plain
    refused(made(Bodiless), "has no separate body")


class Nudged(LlamaForCausalLM):
    """Gives its body more than token ids."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=1.1 * self.model.embed_tokens(input_ids), **kwargs)


class Anticipating(LlamaForCausalLM):
    """Reads the mean of all tokens, later ones included, with this weight."""

    weight = 0.1

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embeddings = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embeddings + self.weight * embeddings.mean(1, keepdim=True), **kwargs)


class Forgetful(LlamaForCausalLM):
    """Reads every token as if it stood alone."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = None
        output = super().forward(input_ids=input_ids.reshape(-1, 1), **kwargs)
        output.logits = output.logits.reshape(*input_ids.shape, -1)
        return output


class Wide(LlamaForCausalLM):
    """Needs more than token ids."""

    def forward(self, input_ids: Tensor, pixels: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Nudged, "gives its body more than token ids"),
        (Anticipating, r"is not causal: later tokens change .* by up to [\d.]+ nats"),
        (Forgetful, "reads no earlier tokens"),
        (Wide, r"cannot be run on token ids alone \(TypeError"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_read_text_otherwise_are_refused(kind: type[Any], why: str, dtype: torch.dtype) -> None:
    refused(made(kind, dtype), why)


def test_little_of_what_comes_later_is_too_much_in_float32() -> None:
    model = made(Anticipating)
    model.weight = 0.002
    refused(model, "is not causal")
    model.weight = 0.0
    assert Head.of(model, VOCAB).is_plain


def test_masked_language_models_are_refused_and_weights_that_are_not_finite() -> None:
    torch.manual_seed(0)
    refused(BertLMHeadModel(BertConfig(**SMALL, intermediate_size=64)).eval(), "is not causal")
    decoder = BertLMHeadModel(BertConfig(**SMALL, intermediate_size=64, is_decoder=True)).eval()
    refused(decoder, r"has weights beside .*cls.predictions")
    sizes = {**SMALL, "intermediate_size": 64, "bos_token_id": 2, "eos_token_id": 1}
    refused(BertGenerationDecoder(BertGenerationConfig(**sizes)).eval(), "is not causal")
    assert Head.of(BertGenerationDecoder(BertGenerationConfig(**sizes, is_decoder=True)).eval(), VOCAB).is_plain
    xlnet = XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64)
    refused(XLNetLMHeadModel(xlnet).eval(), "is not causal")
    model = made()
    model.model.norm.weight.data[0] = torch.nan
    refused(model, "not finite")


def test_a_model_is_left_in_the_mode_that_it_was_in() -> None:
    model = made().train()
    Head.of(model, VOCAB)
    assert model.training
    assert model.model.layers[0].training
