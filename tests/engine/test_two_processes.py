"""Two real processes with gloo, started once: what they compute must be what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.batch import DataKind, collate
from aligndistil.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from aligndistil.engine.policy import FrozenModel
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.models import load_model
from aligndistil.objectives.base import Role
from aligndistil.rollout import SamplingParams, sample_seed
from support.engines import (
    CONSTANT,
    GOALS,
    batch_of,
    make_engine,
    models_of,
    objective,
    plain_loss,
    plain_models,
    sampler,
    section,
    steps_of,
    take_step,
    trained,
)
from support.step_batches import case_of, engine_of, folders_of, train_engine

ModelFolder = Callable[..., str]
Models = tuple[str, list[str]]
NOTHING_STAYS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ROUNDS = [("reward_model", 2), ("kto", 2), ("kto", 3), ("ppo", 0), ("ppo", 2), ("ppo", 3)]


def everything(models: dict[str, Models], folders: dict[str, str], folder: str) -> dict[str, Any]:
    processes = start_processes()
    return {
        "rounds": {f"{name} {stage}": rounds(name, folders, processes, stage) for name, stage in ROUNDS},
        "gradients": {name: gradients(name, models[name], processes, 2) for name in GOALS},
        "losses": {name: losses_by_stage(name, models[name], processes) for name in GOALS},
        "divergences": {str(stage): divergences(models["dpo"], processes, stage) for stage in (0, 3)},
        "uneven": uneven_samples(models["dpo"], processes),
        "resumed": {str(s): resumed(models["dpo"], processes, Path(folder) / str(s), s) for s in (2, 3)},
        "gathered": processes.gather({"rank": processes.rank}),
        "sum": processes.sum(torch.tensor([1.0, float(processes.rank)])).tolist(),
        "max": processes.max(torch.tensor([float(processes.rank)])).tolist(),
        "main": processes.is_main,
    }


@pytest.fixture(scope="module")
def models(model_folder: ModelFolder) -> dict[str, Models]:
    return {name: models_of(name, model_folder) for name in GOALS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def folders(model_folder: ModelFolder) -> dict[str, str]:
    return folders_of(model_folder)


@pytest.fixture(scope="module")
def two(
    models: dict[str, Models], folders: dict[str, str], folder: Path, on_processes: Callable[..., list[Any]]
) -> list[dict[str, Any]]:
    return on_processes(everything, models, folders, str(folder), timeout=240)


def gradients(name: str, models: Models, processes: Processes, micro: int) -> dict[str, Any]:
    train = {**CONSTANT, "batch_size": 8, "micro_batch_size": micro}
    goal = objective(name, **GOALS[name])
    made = make_engine(goal, *models, processes, train=train, engine={"zero_stage": 0})
    per_rank = 8 // processes.world
    mine = steps_of(name, 1, 8)[0][processes.rank * per_rank : (processes.rank + 1) * per_rank]
    for start in range(0, per_rank, micro):
        batch = batch_of(mine[start : start + micro], goal.data)
        made.backward(made.loss(batch, {}), examples=8, last=start + micro >= per_rank)
    found = {key: p.grad.tolist() for key, p in made.model.named_parameters()}
    made.close()
    return found


@pytest.mark.parametrize("name", GOALS)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(
    name: str, models: dict[str, Models], processes: Processes, two: list[dict[str, Any]]
) -> None:
    """Ragged lengths: the mean of the micro-batches' token means would be another number."""
    goal = objective(name, **GOALS[name])
    plain = plain_models(goal, *models[name])
    plain_loss(goal, plain, batch_of(steps_of(name, 1, 8)[0], goal.data)).mean().backward()
    whole = gradients(name, models[name], processes, 8)
    cut = gradients(name, models[name], processes, 2)
    assert two[0]["gradients"] == two[1]["gradients"]
    for parameter, value in plain[Role.POLICY].named_parameters():
        for found in (whole, cut, two[0]["gradients"][name]):
            torch.testing.assert_close(torch.tensor(found[parameter]), value.grad, atol=2e-6, rtol=1e-4)


def losses_by_stage(name: str, models: Models, processes: Processes) -> dict[str, Any]:
    return {
        str(stage): trained(name, models, processes, {"zero_stage": stage}, size=8, micro=2)[:2] for stage in (0, 2, 3)
    }


@pytest.mark.parametrize("name", GOALS)
def test_two_processes_train_like_one_at_every_zero_stage(
    name: str, models: dict[str, Models], processes: Processes, two: list[dict[str, Any]]
) -> None:
    losses, norms, _ = trained(name, models[name], processes, {"zero_stage": 0}, size=8, micro=2)
    assert two[0]["losses"] == two[1]["losses"]
    for ours, our_norms in two[0]["losses"][name].values():
        assert ours == pytest.approx(losses, abs=1e-5)
        assert our_norms == pytest.approx(norms, rel=1e-4)


def rounds(name: str, folders: dict[str, str], processes: Processes, stage: int) -> list[dict[str, float]]:
    case = case_of(name, folders)
    engine = engine_of(case, processes, stage)
    lines = train_engine(engine, case)
    engine.close()
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


@pytest.mark.parametrize(("name", "stage"), ROUNDS)
def test_what_is_found_before_a_step_is_found_over_both_processes(
    name: str, stage: int, folders: dict[str, str], processes: Processes, two: list[dict[str, Any]]
) -> None:
    """Means over all mismatched rows or samples, both trained models, and every metric."""
    alone = rounds(name, folders, processes, 0)
    assert two[0]["rounds"] == two[1]["rounds"]
    for ours, theirs in zip(two[0]["rounds"][f"{name} {stage}"], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)


def divergences(models: Models, processes: Processes, stage: int) -> list[float]:
    """Of the rows of two steps, in batches of three of which the last is not full."""
    policy, (reference, *_) = models
    made = make_engine(
        objective("dpo"), policy, [reference], processes, train={**CONSTANT, "batch_size": 4, "micro_batch_size": 2},
        engine={"zero_stage": stage},
    )  # fmt: skip
    initial = FrozenModel(load_model(reference, section(reference), trained=False), made.vocab)
    rows = [row for pair in steps_of("dpo", 2)[0] for row in pair]
    found = made.divergence(collate(rows, DataKind.RESPONSES, pad_id=0), initial).tolist()
    made.close()
    return [float(value) for value in found]


def test_the_divergence_from_another_model_is_exact_and_the_same_on_every_process(
    models: dict[str, Models], two: list[dict[str, Any]]
) -> None:
    policy, (reference, *_) = models["dpo"]
    plain = plain_models(objective("dpo"), policy, [reference])
    rows = [row for pair in steps_of("dpo", 2)[0] for row in pair]
    expected = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        ours, theirs = (plain[role](ids).logits.log_softmax(-1)[0] for role in (Role.POLICY, Role.REFERENCE))
        at = slice(len(row.prompt_ids) - 1, -1)  # position t - 1 predicts token t
        expected.append(float((ours[at].exp() * (ours[at] - theirs[at])).sum()))
    for rank in two:
        for found in rank["divergences"].values():
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def uneven_samples(models: Models, processes: Processes) -> dict[str, Any]:
    """Rank 0 may write four tokens and rank 1 forty; ZeRO-3 gathers weights at each of them."""
    train = {**CONSTANT, "batch_size": 4, "micro_batch_size": 2}
    engine = {"zero_stage": 3, "deepspeed": NOTHING_STAYS}
    made = make_engine(objective("dpo"), *models, processes, train=train, engine=engine)
    prompts = [[5 + i, 6 + processes.rank] for i in range(3)]
    params = SamplingParams(4 if processes.rank == 0 else 40)
    drawn = sampler(made, synced=True).sample(prompts, params, [sample_seed(processes.rank, i) for i in range(3)])
    loss = take_step(made, steps_of("dpo", 1)[0], 2)[0]
    made.close()
    return {"lengths": [len(sample.token_ids) for sample in drawn], "loss": loss}


def test_processes_that_stop_at_different_lengths_wait_for_each_other(two: list[dict[str, Any]]) -> None:
    first, second = two[0]["uneven"], two[1]["uneven"]
    assert max(first["lengths"]) <= 4 < max(second["lengths"])
    assert first["loss"] == second["loss"]


def resumed(models: Models, processes: Processes, folder: Path, stage: int) -> dict[str, Any]:
    """The last two of four steps, straight and after a checkpoint; and a random number of each."""
    train = {**CONSTANT, "batch_size": 4, "micro_batch_size": 1}

    def engine() -> Any:
        goal = objective("dpo", **GOALS["dpo"])
        return make_engine(goal, *models, processes, train=train, engine={"zero_stage": stage})

    torch.manual_seed(100 + processes.rank)
    straight = engine()
    steps = steps_of("dpo")
    for some in steps[:2]:
        take_step(straight, some, 1)
    save_checkpoint(straight, folder, {"step": 2}, keep=1)
    answers = {"straight": [float(torch.rand(())), *[take_step(straight, some, 1)[:2] for some in steps[2:]]]}
    straight.close()
    torch.manual_seed(0)
    again = engine()
    load_checkpoint(again, checkpoints(folder)[-1])
    answers["again"] = [float(torch.rand(())), *[take_step(again, some, 1)[:2] for some in steps[2:]]]
    again.close()
    return answers


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_processes_continue_exactly_and_each_with_its_own_random_numbers(
    stage: str, two: list[dict[str, Any]]
) -> None:
    for answers in two:
        assert answers["resumed"][stage]["straight"] == answers["resumed"][stage]["again"]
    assert two[0]["resumed"][stage]["again"][0] != two[1]["resumed"][stage]["again"][0]
    assert two[0]["resumed"][stage]["again"][1:] == two[1]["resumed"][stage]["again"][1:]


def test_every_process_sees_the_sum_the_maximum_and_the_objects_of_all(two: list[dict[str, Any]]) -> None:
    for rank, answers in enumerate(two):
        assert answers["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert (answers["sum"], answers["max"]) == ([2.0, 1.0], [1.0])
        assert answers["main"] is (rank == 0)
