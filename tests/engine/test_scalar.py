"""Models with one number a token: where a score and a value stand, in which precision, and on which scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CTRLConfig,
    Gemma2Config,
    GPT2Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.scalar import ScalarModel, ScalarNetwork, scalar_output
from aligndistil.errors import UserError
from aligndistil.maths import last_tokens, sum_tokens
from aligndistil.objectives.base import Need
from support.micro_batches import ragged_batch
from support.models import build_model

VOCAB = 24
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS = {"vocab_size": VOCAB, "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.3}
ARCHITECTURES: list[Callable[[], PretrainedConfig]] = [
    lambda: Qwen2Config(num_key_value_heads=1, **SIZES, **ENDS),
    lambda: Gemma2Config(num_key_value_heads=1, head_dim=8, **SIZES, **ENDS),
    lambda: PhiConfig(**SIZES, **ENDS),
    lambda: GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **ENDS),
]


def scorer(**settings: object) -> torch.nn.Module:
    return build_model(vocab=VOCAB, scalar=True, **settings)


def batch() -> Batch:
    return ragged_batch(DataKind.RESPONSES, 4, VOCAB)


def test_a_score_is_of_the_text_with_its_token_and_a_value_of_the_text_before() -> None:
    two = collate([Row([5, 6], [7, 1]), Row([8], [9, 10, 1])], DataKind.RESPONSES, pad_id=0)
    outputs = torch.arange(1.0, 9.0).view(2, 4)
    assert scalar_output(outputs, two, Need.SCORE).tolist() == [[0, 0, 3, 4], [0, 6, 7, 8]]
    assert scalar_output(outputs, two, Need.NORMALIZED_SCORE).tolist() == [[0, 0, 3, 4], [0, 6, 7, 8]]
    assert scalar_output(outputs, two, Need.VALUE).tolist() == [[0, 0, 2, 3], [0, 5, 6, 7]]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=["qwen2", "gemma2", "phi", "gpt2"])
def test_the_score_of_a_response_is_what_transformers_gives_the_row(config: Callable[[], PretrainedConfig]) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config()).eval()
    rows = batch()
    ours = ScalarModel(model).scores(rows)
    theirs = model(input_ids=rows.ids_BT, attention_mask=rows.attention_BT.long()).logits.squeeze(-1)
    torch.testing.assert_close(sum_tokens(ours, last_tokens(rows.response_BT)), theirs.detach())


def test_a_score_does_not_depend_on_what_comes_after_it() -> None:
    model = ScalarModel(scorer())
    long = Row([5, 6], [7, 8, 9, 1])
    whole = model.scores(collate([long], DataKind.RESPONSES, 0))
    cut = model.scores(collate([Row([5, 6], [7, 8]), long], DataKind.RESPONSES, 0))
    torch.testing.assert_close(cut[0, :4], whole[0, :4])


def test_a_normalized_score_is_on_the_scale_that_its_model_was_measured_on() -> None:
    model = scorer()
    model.config.score_mean, model.config.score_std = 3.0, 0.25
    plain = ScalarModel(model).scores(batch())
    torch.testing.assert_close(ScalarModel(model, normalized=True).scores(batch()), (plain - 3.0) / 0.25)


def test_a_frozen_scorer_gets_no_gradient_and_no_dropout() -> None:
    model = scorer().train()
    scores = ScalarModel(model).scores(batch())
    assert not scores.requires_grad
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_scores_of_a_bfloat16_model_are_not_rounded_to_it() -> None:
    network = ScalarNetwork(scorer().to(torch.bfloat16))
    rows = batch()
    scores = network(rows)
    assert scores.dtype == torch.float32
    hidden = network.model.model(input_ids=rows.ids_BT).last_hidden_state
    exact = (hidden.double() @ network.head.weight.double().t()).squeeze(-1)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    assert (scores - scores.bfloat16().float()).abs().max() > 1e-4
    scores.sum().backward()
    assert network.head.weight.grad is not None


def test_a_head_with_a_bias_adds_it() -> None:
    model = scorer()
    without = ScalarModel(model).scores(batch())
    model.score = torch.nn.Linear(32, 1)
    with torch.no_grad():
        model.score.weight.copy_(scorer().score.weight)
        model.score.bias.fill_(2.5)
    torch.testing.assert_close(ScalarModel(model).scores(batch()), without + 2.5)


def test_a_head_of_another_name_is_found() -> None:
    config = CTRLConfig(n_embd=16, n_layer=1, n_head=2, dff=16, n_positions=32, **ENDS)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = batch()
    network = ScalarModel(model).network
    assert network.head is model.classifier
    theirs = [
        model(input_ids=ids[mask][None]).logits.item() for ids, mask in zip(rows.ids_BT, rows.attention_BT, strict=True)
    ]
    ours = sum_tokens(ScalarModel(model).scores(rows), last_tokens(rows.response_BT))
    torch.testing.assert_close(ours, torch.tensor(theirs))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (BertConfig, "scores a text otherwise than with its linear head at the last token"),  # at the first
        (RobertaConfig, "has no linear head with one output on its hidden states, but classifier"),
    ],
)
def test_what_is_no_linear_head_at_the_last_token_is_refused(kind: type[PretrainedConfig], sentence: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(kind(**SIZES, **ENDS))
    with pytest.raises(UserError, match=sentence) as caught:
        ScalarModel(model)
    assert "\n" not in str(caught.value)


def test_a_score_that_transformers_changes_after_the_head_is_refused() -> None:
    model = scorer()
    model.score.register_forward_hook(lambda module, given, output: output + 0.05)
    with pytest.raises(UserError, match="scores a text otherwise than"):
        ScalarModel(model)
