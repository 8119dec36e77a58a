"""Policy, teachers and reference as adapters on one base: the same numbers as whole models, one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.models import Bases, load_model, load_scalar_model
from aligndistil.recipe import Engine as Settings
from aligndistil.recipe import Train
from support.adapters import write_adapter
from support.engines import CONSTANT, batch_of, make_engine, objective, section, steps_of, take_step
from support.step_batches import TWO_PASSES, Case, engine_of, train_engine

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
    weights = dict(load_model(base, section(base), trained=False).named_parameters())
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


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (3, 3), (0, 3), (3, 2), (2, 0)])
def test_a_checkpoint_holds_adapters_alone_and_goes_on_at_every_zero_stage(
    before: int, after: int, base: str, adapters: list[str], processes: Processes, tmp_path: Path
) -> None:
    first, *rest = steps_of("aligndistil", 3)
    straight = distilled(processes, base, adapters[1:], before)
    take_step(straight, first, 2)
    path = save_checkpoint(straight, tmp_path, {"step": 1}, keep=1)
    (states,) = path.rglob("*model_states.pt")
    written = torch.load(states, weights_only=False)
    assert [name for name in written["module"] or () if ".lora_" not in name] == []
    assert not written.get("frozen_param_fragments")
    expected = [take_step(straight, some, 2) for some in rest]
    straight.close()
    again = distilled(processes, base, adapters[1:], after)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    found = [take_step(again, some, 2) for some in rest]
    again.close()
    if before == after:
        assert found == expected
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_dropout_is_of_training_alone_and_is_no_noise(
    base: str, adapters: list[str], processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    engine = distilled(processes, adapters[0], adapters[1:], lora={"r": 4, "alpha": 8, "dropout": 0.5})
    batch = batch_of(steps_of("aligndistil", 1)[0], engine.objective.data)
    engine.settle(batch)
    assert caplog.records == []

    def loss() -> torch.Tensor:
        return engine.loss(batch, {}).per_example.detach()

    torch.manual_seed(5)
    first, second = loss(), loss()
    torch.manual_seed(5)
    assert torch.equal(loss(), first)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(engine.evaluate(batch, {}).per_example, engine.evaluate(batch, {}).per_example)
    with engine.generating():
        assert not any(part.training for part in engine.model.modules())
    engine.close()


def ppo_on_one_base(base: str, reward: str, critic: str) -> Case:
    goal = objective("ppo", kl_coef=0.3, gamma=0.95, gae_lambda=0.9)
    return Case(goal, TWO_PASSES, 1, base, [base, reward], critic)


def ppo_lines(base: str, reward: str, critic: str, zero: int, processes: Processes) -> list[dict[str, float]]:
    case = ppo_on_one_base(base, reward, critic)
    engine = engine_of(case, processes, zero, model={**LORA, "gradient_checkpointing": zero > 0})
    lines = train_engine(engine, case)
    parts = {name: deepspeed.module.model for name, deepspeed in engine.deepspeed.items()}
    own = [{id(p) for p in model.parameters()} for model in parts.values()]
    trained = [{id(p) for p in model.parameters() if p.requires_grad} for model in parts.values()]
    assert own[0] & own[1]
    assert not trained[0] & own[1]
    assert not trained[1] & own[0]
    engine.close()
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def all_of_two(base: str, adapters: list[str], reward: str) -> dict[str, Any]:
    processes = start_processes()
    found: dict[str, Any] = {}
    for zero in (2, 3):
        engine = distilled(processes, base, adapters[1:], zero, gradient_checkpointing=True)
        found[f"distilled {zero}"] = three_steps(engine)
        batch = batch_of(steps_of("aligndistil", 1)[0], engine.objective.data)
        initial = engine.beside(Bases(section(base, **LORA)).language_model(adapters[0]))
        found[f"divergence {zero}"] = engine.divergence(batch, initial).tolist()
        engine.close()
        found[f"ppo {zero}"] = ppo_lines(base, reward, base, zero, processes)
    return found


@pytest.fixture(scope="module")
def reward(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("reward"), base, seed=7, scalar=True)


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("from_reward", [False, True])
def test_actor_and_critic_on_one_base_train_as_apart(
    from_reward: bool, zero: int, base: str, reward: str, processes: Processes
) -> None:
    """Apart: the same adapters on copies of the base, which share nothing."""
    critic = reward if from_reward else base
    found = ppo_lines(base, reward, critic, zero, processes)
    expected = apart(base, reward, critic, processes)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)


def apart(base: str, reward: str, critic: str, processes: Processes) -> list[dict[str, float]]:
    case, options = ppo_on_one_base(base, reward, critic), section(base, **LORA)
    engine = Engine(
        Bases(options).language_model(base, trained=True),
        {
            "reference": load_model(base, options, trained=False),
            "reward": load_scalar_model(reward, options, trained=False),
        },
        case.goal,
        train=Train.model_validate(case.train),
        settings=Settings.model_validate({"zero_stage": 0}),
        processes=processes,
        total_steps=case.steps,
        vocab=96,
        critic=Bases(options).scalar_model(critic, trained=True),
    )
    lines = train_engine(engine, case)
    engine.close()
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


@pytest.mark.timeout(300)
def test_two_processes_train_adapters_as_one_does(
    base: str, adapters: list[str], reward: str, processes: Processes, on_processes: Callable[..., list[Any]]
) -> None:
    first, second = on_processes(all_of_two, base, adapters, reward, timeout=240)
    plain = distilled(processes, base, adapters[1:])
    expected = three_steps(plain)
    plain.close()
    for zero in (2, 3):
        for name in ("distilled", "ppo", "divergence"):
            assert first[f"{name} {zero}"] == second[f"{name} {zero}"]
        torch.testing.assert_close(
            torch.tensor(first[f"distilled {zero}"]), torch.tensor(expected), atol=1e-5, rtol=1e-4
        )
        assert first[f"divergence {zero}"] == pytest.approx(first["divergence 2"], rel=1e-4)
        for ours, theirs in zip(first[f"ppo {zero}"], apart(base, reward, base, processes), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)
