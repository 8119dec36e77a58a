"""Randomness in training mode: it is found by two passes over one batch, switched off, and said; else refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aligndistil.batch import DataKind
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.errors import UserError
from support.engines import CONSTANT, batch_of, examples, make_engine, objective

ONE = {"batch_size": 4, "micro_batch_size": 4, **CONSTANT}


@pytest.fixture(scope="module")
def processes() -> Processes:
    return start_processes()


class Noise(nn.Module):
    """Multiplies by numbers near 1: in training mode, and with `always` in evaluation mode too."""

    def __init__(self, inner: nn.Module, size: float, always: bool = False) -> None:
        super().__init__()
        self.inner, self.size, self.always = inner, size, always

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if not (self.training or self.always):
            return output
        return output * torch.empty_like(output).uniform_(1 - self.size, 1 + self.size)


def dpo(folder: Callable[..., str], processes: Processes, **options: Any) -> Engine:
    model = folder(seed=0)
    goal, train, settings = objective("dpo", beta=0.5), {**ONE}, {"zero_stage": options.pop("zero_stage", 0)}
    return make_engine(goal, model, [model], processes, train=train, engine=settings, model=options)


PAIRS = batch_of(examples(4, DataKind.PAIRS), DataKind.PAIRS)


def first_loss(engine: Engine) -> float:
    loss = engine.loss(PAIRS, {})
    engine.backward(loss, examples=4, last=True)
    return float(loss.per_example.detach().mean())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [0.01, 0.3])
def test_noise_of_training_mode_is_switched_off_and_that_is_said(
    model_folder: Callable[..., str],
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
    size: float,
    checkpointing: bool,
) -> None:
    engine = dpo(model_folder, processes, gradient_checkpointing=checkpointing)
    for layer in engine.model.model.layers:
        layer.mlp = Noise(layer.mlp, size)
    assert abs(first_loss(engine) - 0.693147) > 1e-4
    with caplog.at_level(logging.WARNING):
        engine.settle(PAIRS)
    (record,) = caplog.records
    assert "(LlamaForCausalLM) is random in training mode: two passes over the first batch differ by" in record.message
    assert "nats a token" in record.message
    assert first_loss(engine) == pytest.approx(0.693147, abs=1e-6)
    # What is recomputed in the backward pass still is, and nothing else is in training mode.
    inner = {part.training for name, part in engine.model.named_modules() if name.endswith(("mlp", "self_attn"))}
    assert inner == {False}
    assert {layer.training for layer in engine.model.model.layers} == {checkpointing}
    with engine.generating():
        assert not any(part.training for part in engine.model.modules())
    engine.close()


def test_a_model_that_repeats_itself_stays_in_training_mode_and_draws_nothing(
    model_folder: Callable[..., str], processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    engine = dpo(model_folder, processes)
    state = torch.get_rng_state()
    engine.settle(PAIRS)
    assert torch.equal(torch.get_rng_state(), state)
    first_loss(engine)
    assert all(part.training for part in engine.model.modules())
    assert not caplog.records
    engine.close()


def test_the_random_numbers_of_the_check_are_not_those_of_training(
    model_folder: Callable[..., str], processes: Processes
) -> None:
    engine = dpo(model_folder, processes)
    layer = engine.model.model.layers[0]
    layer.mlp = Noise(layer.mlp, 0.1)
    state = torch.get_rng_state()
    engine.settle(PAIRS)
    assert torch.equal(torch.get_rng_state(), state)
    engine.close()


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_noise_that_evaluation_mode_has_too_is_refused_with_its_size(
    model_folder: Callable[..., str], processes: Processes, size: float
) -> None:
    engine = dpo(model_folder, processes)
    layer = engine.model.model.layers[1]
    layer.mlp = Noise(layer.mlp, size, always=True)
    with pytest.raises(UserError, match=r"is random: two passes over the first batch differ by [\d.e-]+ nats a token"):
        engine.settle(PAIRS)
    engine.close()


def test_scalar_heads_are_settled_too(
    model_folder: Callable[..., str], processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    goal, model = objective("reward_model"), model_folder(seed=0, scalar=True)
    engine = make_engine(goal, model, [], processes, train=ONE, engine={"zero_stage": 0})
    engine.model.model.norm = Noise(engine.model.model.norm, 0.1)
    engine.settle(PAIRS)
    assert "(LlamaForSequenceClassification) is random" in caplog.text
    assert "score a token" in caplog.text
    engine.close()
