"""Policy, teachers and reference as adapters on one base: the same numbers as whole models, one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.models import Bases, load_model
from support.adapters import write_adapter
from support.engines import CONSTANT, batch_of, make_engine, objective, section, steps_of, take_step

ModelFolder = Callable[..., str]
LORA = {"lora": {"r": 4, "alpha": 8}}
TRAIN = {**CONSTANT, "batch_size": 4, "micro_batch_size": 2}
STAGES = [0, 2, 3]


@pytest.fixture(scope="module")
def base(model_folder: ModelFolder) -> str:
    return model_folder(seed=0)


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / str(seed), base, seed=seed) for seed in (1, 2, 3)]


def distilled(processes: Processes, base: str, teachers: list[str], zero: int = 0, **model: Any) -> Engine:
    return make_engine(
        objective("aligndistil", r=5.0),
        base,
        teachers,
        processes,
        train=TRAIN,
        engine={"zero_stage": zero},
        model={**LORA, **model},
    )


def three_steps(engine: Engine) -> list[tuple[float, float, float]]:
    return [take_step(engine, some, 2) for some in steps_of("aligndistil", 3)]


def test_the_losses_are_those_of_merged_weights(base: str, adapters: list[str], processes: Processes) -> None:
    """Every model starts from an adapter; the whole models are those that merging makes."""
    on_one_base = distilled(processes, adapters[0], adapters[1:])
    whole = make_engine(  # without `model.lora`, an adapter folder is read as the whole model that it makes
        objective("aligndistil", r=5.0), *(adapters[0], adapters[1:]), processes, train=TRAIN, engine={"zero_stage": 0}
    )
    for some in steps_of("aligndistil", 3):
        batch = batch_of(some, on_one_base.objective.data)
        ours, theirs = (engine.loss(batch, {}).per_example.detach() for engine in (on_one_base, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.abs().max() > 0.1
    on_one_base.close()
    whole.close()


def test_the_base_is_held_once(base: str, adapters: list[str]) -> None:
    bases = Bases(section(base, **LORA))
    policy = bases.language_model(base, trained=True)
    others = [bases.language_model(path) for path in (*adapters, base)]
    weights = {name: p for name, p in load_model(base, section(base), trained=False).named_parameters()}
    shared = {id(p): p for model in (policy, *others) for p in model.parameters() if not _of_adapter(model, p)}
    assert sum(p.numel() for p in shared.values()) == sum(p.numel() for p in weights.values())
    assert all(not p.requires_grad for model in others for p in model.parameters())
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of the seven linear layers of two blocks
    assert all("lora_" in name for name in trained)


def _of_adapter(model: Any, parameter: torch.Tensor) -> bool:
    return any(p is parameter and "lora_" in name for name, p in model.named_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero", STAGES)
def test_every_zero_stage_takes_the_same_steps(
    zero: int, checkpointing: bool, base: str, adapters: list[str], processes: Processes
) -> None:
    plain = distilled(processes, base, adapters[1:])
    engine = distilled(processes, base, adapters[1:], zero, gradient_checkpointing=checkpointing)
    expected, found = three_steps(plain), three_steps(engine)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    state = engine.state_dict(trained_only=True)
    moved = plain.state_dict(trained_only=True)
    assert state.keys() == moved.keys()
    assert all("lora_" in name for name in state)
    for name, value in moved.items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)
    assert all(float(value.abs().sum()) > 0 for name, value in state.items() if "lora_B" in name)
    engine.close()
    plain.close()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero_3_keeps_no_frozen_parameter_after_a_step(
    checkpointing: bool, base: str, adapters: list[str], processes: Processes
) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    settings = {"zero_stage": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    engine = make_engine(
        objective("aligndistil", r=5.0),
        base,
        adapters[1:],
        processes,
        train=TRAIN,
        engine=settings,
        model={**LORA, "gradient_checkpointing": checkpointing},
    )
    three_steps(engine)
    statuses: dict[str, Any] = {name: p for name, p in engine.model.named_parameters() if not p.requires_grad}
    whole = [name for name, p in statuses.items() if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE]
    assert whole == []
    engine.close()
