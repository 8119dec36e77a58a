"""Whole models: a Policy's terms and gradients against model(...).logits, in several architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.head import backbone
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.engine.rows import Body
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Objective, Role
from aligndistil.objectives.sft import SFT
from support.micro_batches import given, ragged_batch
from support.models import build_model
from support.objectives import EVERY_OBJECTIVE, VARIANTS, language_roles, named
from support.plain_formula import plain_loss

OBJECTIVES = [objective for objective in EVERY_OBJECTIVE if not objective.is_scalar]
DEFAULTS = [objective for objective in OBJECTIVES if objective not in VARIANTS]
VOCAB = 24
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def llama(vocab: int = VOCAB, **settings: Any) -> PreTrainedModel:
    return build_model(vocab=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, **settings)


def qwen2(vocab: int = VOCAB, tied: bool = True) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, tie_word_embeddings=tied, **LAYERS))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, head_dim=8, final_logit_softcapping=2.0, **LAYERS))


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(vocab_size=VOCAB, logit_scale=0.25, **LAYERS))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(vocab_size=VOCAB, logits_scaling=4.0, **LAYERS))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def phi() -> PreTrainedModel:
    model = PhiForCausalLM(PhiConfig(vocab_size=VOCAB, tie_word_embeddings=False, **LAYERS))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


ARCHITECTURES = [llama, qwen2, gemma2, cohere, granite, gpt2, phi]


def seeded(build: Callable[..., PreTrainedModel], seed: int, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build(**settings).double().eval()


Models = dict[str, PreTrainedModel]
Found = Mapping[str, Tensor]


def logits_of(model: PreTrainedModel, batch: Batch, vocab: int = VOCAB) -> Tensor:
    output = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long(), use_cache=False)
    return output.logits[..., :vocab]


def found_for(objective: Objective, batch: Batch, models: Models) -> Found:
    """What the loss is given beside the terms of its language models."""
    with torch.no_grad():
        return given(objective, batch, logits_of(models[Role.POLICY], batch))


def plain(objective: Objective, batch: Batch, models: Models, found: Found) -> Tensor:
    logits = {role: logits_of(model, batch) for role, model in models.items()}
    scalars = {role: torch.zeros(batch.ids_BT.shape) for role, n in objective.update_needs.items() if n.is_scalar}
    return plain_loss(objective, batch, {**scalars, **logits}, found).per_example


def chunked(objective: Objective, batch: Batch, models: Models, chunk: int | None, found: Found) -> Tensor:
    policy = Policy(models[Role.POLICY], VOCAB, chunk)
    frozen = {role: FrozenModel(m, VOCAB).read(batch) for role, m in models.items() if role != Role.POLICY}
    return objective.loss(batch, {**policy(batch, objective, frozen), **found}).per_example


def assert_same(objective: Objective, models: Models, chunk: int | None, examples: int = 3) -> None:
    batch = ragged_batch(objective.data, examples, VOCAB)
    policy, found = models[Role.POLICY], found_for(objective, batch, models)
    expected = plain(objective, batch, models, found)
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    losses = chunked(objective, batch, models, chunk, found)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-8)
    losses.mean().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == set(gradients)
    for name, p in policy.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("build", [llama, qwen2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_a_policy_has_the_loss_and_gradients_of_the_model(
    objective: Objective, build: Callable[..., PreTrainedModel], tied: bool, chunk: int | None
) -> None:
    models = {role: seeded(build, seed, tied=tied) for seed, role in enumerate(language_roles(objective))}
    assert_same(objective, models, chunk)


@pytest.mark.parametrize("build", ARCHITECTURES)
@pytest.mark.parametrize("objective", DEFAULTS, ids=named)
def test_every_architecture_is_read_as_it_reads_itself(
    objective: Objective, build: Callable[..., PreTrainedModel]
) -> None:
    models = {role: seeded(build, seed) for seed, role in enumerate(language_roles(objective))}
    assert_same(objective, models, 7)


@pytest.mark.parametrize(
    "objective", [AlignDistil(), *(variant for variant in VARIANTS if not variant.is_scalar)], ids=named
)
@pytest.mark.parametrize("sizes", [(24, 31, 40), (40, 24, 31), (31, 40, 24)])
def test_models_padded_to_different_vocabularies_are_cut_to_the_tokenizer_s(
    objective: Objective, sizes: tuple[int, ...]
) -> None:
    models = {role: seeded(llama, n, vocab=sizes[n]) for n, role in enumerate(language_roles(objective))}
    assert_same(objective, models, 7)


def test_rows_beyond_the_vocabulary_get_no_gradient_from_the_head() -> None:
    model = seeded(llama, 0, vocab=40, tied=False)
    batch = ragged_batch(DataKind.RESPONSES, vocab=VOCAB)
    chunked(SFT(), batch, {Role.POLICY: model}, 7, {}).mean().backward()
    weight = model.get_output_embeddings().weight
    assert weight.grad is not None
    assert torch.all(weight.grad[VOCAB:] == 0)
    assert torch.all(weight.grad[:VOCAB].abs().sum(-1) > 0)


def test_the_state_before_a_token_predicts_it() -> None:
    model = seeded(llama, 0)
    batch = collate([Row([5, 6], [7, 1]), Row([8], [9, 10, 1])], DataKind.RESPONSES, pad_id=0)
    states = backbone(model)(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).last_hidden_state
    # tokens 2 and 3 of the first row, 1 to 3 of the second
    expected = torch.stack([states[0, 1], states[0, 2], states[1, 0], states[1, 1], states[1, 2]])
    torch.testing.assert_close(Body(model).response_states(batch), expected)


def test_padding_of_a_row_does_not_change_its_loss() -> None:
    model = seeded(llama, 0)
    short, long = Row([5, 6], [7, 1]), Row([8], [9, 10, 11, 12, 1])
    together = chunked(SFT(), collate([short, long], DataKind.RESPONSES, 0), {Role.POLICY: model}, 7, {})
    alone = chunked(SFT(), collate([short], DataKind.RESPONSES, 0), {Role.POLICY: model}, 7, {})
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=1e-8)


def test_terms_are_zero_outside_the_response_and_need_no_gradient_in_evaluation() -> None:
    objective = AlignDistil()
    models = {role: seeded(llama, seed) for seed, role in enumerate(objective.needs)}
    batch = ragged_batch(objective.data, vocab=VOCAB)
    policy = Policy(models[Role.POLICY], VOCAB, 7)
    frozen = {role: FrozenModel(m, VOCAB).read(batch) for role, m in models.items() if role != Role.POLICY}
    trained = policy(batch, objective, frozen)
    with torch.no_grad():
        evaluated = policy(batch, objective, frozen)
    assert list(trained) == list(evaluated)
    for name, term in evaluated.items():
        assert not term.requires_grad
        assert torch.all(term[~batch.response_BT] == 0)
        torch.testing.assert_close(term, trained[name].detach())


def test_a_frozen_model_is_left_without_gradients_and_dropout() -> None:
    model = llama().train()
    frozen = FrozenModel(model, VOCAB)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not frozen.read(ragged_batch(DataKind.RESPONSES, vocab=VOCAB)).hidden.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_on_a_gpu_in_bfloat16_the_loss_is_close_to_float32(objective: Objective) -> None:
    models = {role: llama(seed=seed) for seed, role in enumerate(language_roles(objective))}
    batch = ragged_batch(objective.data, vocab=VOCAB)
    found = found_for(objective, batch, models)
    expected = plain(objective, batch, models, found)
    there = {role: model.to("cuda", torch.bfloat16) for role, model in models.items()}
    losses = chunked(objective, batch.to("cuda"), there, 7, {name: value.to("cuda") for name, value in found.items()})
    torch.testing.assert_close(losses.cpu(), expected, rtol=0.1, atol=0.1)
    losses.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in there[Role.POLICY].parameters())
