"""Estimates against what is really there, and against arithmetic."""

import pytest

from aligndistil.estimate import GIB, ModelSize, memory, model_size
from aligndistil.models import builtin_model
from aligndistil.objectives.base import Role
from aligndistil.recipe import load_recipe

MILLION = ModelSize(parameters=1_000_000, hidden=128, layers=4, vocab=1_000)


@pytest.fixture
def stage(tmp_path):
    def make(**engine):
        text = f"""
model: {{path: builtin:tiny, dtype: float32}}
objective: {{name: dpo}}
models: {{reference: builtin:tiny}}
data: {{train: {{path: builtin:reviews}}}}
train: {{batch_size: 8, micro_batch_size: 1}}
engine: {{{", ".join(f"{key}: {value}" for key, value in engine.items())}}}
"""
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml").stages["dpo"]

    return make


def test_parameters_are_counted_without_loading_weights():
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"))
    assert model_size("builtin:tiny").parameters == sum(p.numel() for p in real.parameters())


def test_float32_states_are_4_bytes_of_weights_4_of_gradients_8_of_adam(stage):
    needed = memory(stage(zero_stage=0), MILLION, {Role.REFERENCE: MILLION}, processes=1)
    assert needed.weights * GIB == pytest.approx(4e6)
    assert needed.gradients * GIB == pytest.approx(4e6)
    assert needed.optimizer * GIB == pytest.approx(8e6)
    assert needed.frozen * GIB == pytest.approx(4e6)


@pytest.mark.parametrize(("zero", "divided"), [(1, {"optimizer"}), (2, {"optimizer", "gradients"})])
def test_zero_divides_states_over_processes(stage, zero, divided):
    whole = memory(stage(zero_stage=0), MILLION, {}, processes=4)
    split = memory(stage(zero_stage=zero), MILLION, {}, processes=4)
    for part in ("weights", "gradients", "optimizer"):
        factor = 4 if part in divided else 1
        assert getattr(split, part) == pytest.approx(getattr(whole, part) / factor)


def test_stage_3_divides_weights_and_frozen_models_too(stage):
    needed = memory(stage(zero_stage=3), MILLION, {Role.REFERENCE: MILLION}, processes=4)
    assert needed.weights * GIB == pytest.approx(1e6)
    assert needed.frozen * GIB == pytest.approx(1e6)
