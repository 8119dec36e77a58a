"""The same numbers at every ZeRO stage, batch cut and number of processes: those of a plain loop with full logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from aligndistil.engine.processes import Processes
from aligndistil.rollout import SamplingParams
from support.engines import (
    CONSTANT,
    GOALS,
    batch_of,
    examples,
    make_engine,
    models_of,
    objective,
    plain_training,
    sampler,
    steps_of,
    take_step,
    trained,
)

ModelFolder = Callable[..., str]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_like_a_plain_loop_with_full_logits(
    stage: int, name: str, tied: bool, model_folder: ModelFolder, processes: Processes
) -> None:
    models = models_of(name, model_folder, tied)
    goal = objective(name, **GOALS[name])
    losses, norms, weights = plain_training(goal, *models, steps_of(name), CONSTANT["learning_rate"])
    # Everything is gathered and let go of again when no parameter is small enough to stay.
    extra = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    ours, our_norms, state = trained(name, models, processes, {"zero_stage": stage, **extra})
    assert ours == pytest.approx(losses, abs=1e-5)
    assert our_norms == pytest.approx(norms, rel=1e-4)
    assert set(state) == set(weights)
    for parameter, value in state.items():
        torch.testing.assert_close(value, weights[parameter].detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_stays_close_to_float32(stage: int, model_folder: ModelFolder, processes: Processes) -> None:
    models = models_of("dpo", model_folder)
    losses, norms, _ = trained("dpo", models, processes, {"zero_stage": 0})
    ours, our_norms, state = trained("dpo", models, processes, {"zero_stage": stage}, model={"dtype": "bfloat16"})
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert ours == pytest.approx(losses, rel=0.05)
    assert our_norms == pytest.approx(norms, rel=0.1)


def test_bfloat16_keeps_what_is_too_small_for_it(model_folder: ModelFolder, processes: Processes) -> None:
    """A step of 2e-5 is below the resolution of most bfloat16 weights: only float32 masters add sixty of them up."""
    policy, frozen = models_of("dpo", model_folder)
    train = {**CONSTANT, "learning_rate": 2e-5, "batch_size": 2, "micro_batch_size": 2}
    for stage in (0, 2):
        made = make_engine(
            objective("dpo"), policy, frozen, processes, train=train, engine={"zero_stage": stage},
            model={"dtype": "bfloat16"}, steps=60,
        )  # fmt: skip
        before = made.state_dict()["model.embed_tokens.weight"].float()
        some = examples(2, made.objective.data)
        for _ in range(60):
            take_step(made, some, 2)
        moved = (made.state_dict()["model.embed_tokens.weight"].float() - before).abs()
        made.close()
        # Sixty steps of the same sign move a weight by 60 * 2e-5 = 1.2e-3; weights near 0.3 have a resolution of 1e-3.
        assert moved.max() > 5e-4
        assert (moved > 0).float().mean() > 0.2


def test_models_beside_a_sharded_policy_are_sharded_too(model_folder: ModelFolder, processes: Processes) -> None:
    policy, frozen = models_of("aligndistil", model_folder)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    train = {**CONSTANT, "batch_size": 2, "micro_batch_size": 2}
    goal = objective("aligndistil")
    made = make_engine(goal, policy, frozen, processes, train=train, engine={"zero_stage": 3, "deepspeed": extra})
    assert all(hasattr(p, "ds_id") for model in made._frozen.values() for p in model.model.parameters())
    taken = [take_step(made, some, 2) for some in steps_of("aligndistil", 2, 2)]
    assert all(math.isfinite(loss) for loss, _, _ in taken)
    made.close()


def test_generation_under_zero_3_gives_the_samples_of_stage_0_and_training_goes_on(
    model_folder: ModelFolder, processes: Processes
) -> None:
    policy, frozen = models_of("dpo", model_folder)
    train = {**CONSTANT, "batch_size": 4, "micro_batch_size": 4}
    prompts, seeds = [[5, 6], [7], [8, 9, 10]], [1, 2, 3]
    seen = []
    for stage in (0, 3):
        extra = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage else {}
        made = make_engine(
            objective("dpo"), policy, frozen, processes, train=train, engine={"zero_stage": stage, **extra}
        )
        losses, samples = [], []
        for some in steps_of("dpo"):
            samples.append(sampler(made).sample(prompts, SamplingParams(12), seeds))
            losses.append(take_step(made, some, 4)[0])
        made.close()
        seen.append((losses, samples))
    assert seen[0][1] == seen[1][1]
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-5)
    assert seen[0][1][0] != seen[0][1][-1]  # the policy has moved


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_learning_rate_follows_its_formula(
    scheduler: str, floor: float, model_folder: ModelFolder, processes: Processes
) -> None:
    """Ten steps, the first two of them warm-up: 1/2, 1, then from 1 towards the floor over the eight others."""
    policy, frozen = models_of("dpo", model_folder)
    schedule = {"learning_rate": 1e-3, "lr_scheduler": scheduler, "min_lr_ratio": floor, "warmup_ratio": 0.2}
    train = {**schedule, "batch_size": 1, "micro_batch_size": 1}
    made = make_engine(objective("dpo"), policy, frozen, processes, train=train, engine={"zero_stage": 0}, steps=10)
    some = examples(1, made.objective.data)
    rates = [take_step(made, some, 1)[2] for _ in range(10)]
    made.close()
    done = [k / 8 for k in range(8)]
    shapes = {
        "cosine": [0.5 * (1 + math.cos(math.pi * x)) for x in done],
        "linear": [1 - x for x in done],
        "constant": [1.0 for _ in done],
    }
    expected = [0.5, 1.0] + [floor + (1 - floor) * shape for shape in shapes[scheduler]]
    assert rates == pytest.approx([1e-3 * share for share in expected], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_a_schedule_may_be_all_warm_up(scheduler: str, model_folder: ModelFolder, processes: Processes) -> None:
    """No step has a rate of 0: a run of one step would end with the model that it began with."""
    policy, frozen = models_of("dpo", model_folder)
    train = {"learning_rate": 1.0, "lr_scheduler": scheduler, "warmup_ratio": 1.0, "batch_size": 1}
    made = make_engine(objective("dpo"), policy, frozen, processes, train=train, engine={"zero_stage": 0}, steps=2)
    some = examples(1, made.objective.data)
    assert [take_step(made, some, 1)[2] for _ in range(2)] == [0.5, 1.0]
    made.close()


def test_the_gradient_is_clipped_to_its_norm(model_folder: ModelFolder, processes: Processes) -> None:
    models = models_of("dpo", model_folder)
    goal = objective("dpo", **GOALS["dpo"])
    losses, norms, _ = plain_training(goal, *models, steps_of("dpo"), 1e-3, max_norm=1e-3)
    free, _, _ = trained("dpo", models, processes, {"zero_stage": 0}, train={"max_grad_norm": 1e9})
    for stage in (0, 2):
        ours, our_norms, _ = trained("dpo", models, processes, {"zero_stage": stage}, train={"max_grad_norm": 1e-3})
        assert ours == pytest.approx(losses, abs=1e-5)
        assert our_norms == pytest.approx(norms, rel=1e-4)  # the norm before clipping
    assert max(norms) > 1e-3
    assert len(free) == 4


@pytest.mark.parametrize("stage", [0, 2])
def test_weight_decay_spares_the_gains_of_norms(stage: int, model_folder: ModelFolder, processes: Processes) -> None:
    """With a gradient of almost nothing, a step of AdamW leaves w (1 - learning_rate * weight_decay)."""
    policy, frozen = models_of("dpo", model_folder)
    decay = {"learning_rate": 1e-2, "weight_decay": 0.5, "max_grad_norm": 1e-12}
    made = make_engine(
        objective("dpo"), policy, frozen, processes,
        train={**CONSTANT, **decay, "batch_size": 1}, engine={"zero_stage": stage},
    )  # fmt: skip
    before = made.state_dict()
    take_step(made, examples(1, made.objective.data), 1)
    after = made.state_dict()
    made.close()
    for name, value in before.items():
        factor = 1.0 if value.ndim == 1 else 1 - 1e-2 * 0.5
        # AdamW divides by |g| + 1e-8, so gradients of 1e-12 move a weight by no more than 1e-2 * 1e-4.
        torch.testing.assert_close(after[name], value * factor, atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_changes_no_number(stage: int, model_folder: ModelFolder, processes: Processes) -> None:
    models = models_of("aligndistil", model_folder)
    plain, plain_norms, _ = trained("aligndistil", models, processes, {"zero_stage": stage})
    ours, norms, _ = trained(
        "aligndistil", models, processes, {"zero_stage": stage}, model={"gradient_checkpointing": True}
    )
    assert ours == pytest.approx(plain, abs=1e-6)
    assert norms == pytest.approx(plain_norms, rel=1e-5)


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_offloading_changes_no_number(
    stage: int, offload: str, model_folder: ModelFolder, processes: Processes
) -> None:
    models = models_of("dpo", model_folder)
    plain, _, _ = trained("dpo", models, processes, {"zero_stage": stage})
    ours, _, _ = trained("dpo", models, processes, {"zero_stage": stage, "offload": offload})
    assert ours == pytest.approx(plain, abs=1e-5)


def test_evaluation_leaves_no_gradient_behind(model_folder: ModelFolder, processes: Processes) -> None:
    policy, frozen = models_of("aligndistil", model_folder)
    goal = objective("aligndistil")
    seen = []
    for looks in (False, True):
        train = {**CONSTANT, "batch_size": 4, "micro_batch_size": 2}
        made = make_engine(goal, policy, frozen, processes, train=train, engine={"zero_stage": 2})
        losses = []
        for some in steps_of("aligndistil", 3):
            if looks:
                made.evaluate(batch_of(some, goal.data), {})
            losses.append(take_step(made, some, 2)[0])
        made.close()
        seen.append(losses)
    assert seen[0] == seen[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "loss", "norm"), [("bfloat16", 0.05, 0.2), ("float32", 1e-4, 1e-3)])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", GOALS)
def test_on_a_gpu_the_engine_trains_like_a_plain_loop_on_a_cpu(
    name: str, stage: int, dtype: str, loss: float, norm: float, model_folder: ModelFolder, processes: Processes
) -> None:
    models = models_of(name, model_folder)
    goal = objective(name, **GOALS[name])
    losses, norms, _ = plain_training(goal, *models, steps_of(name), CONSTANT["learning_rate"])
    ours, our_norms, _ = trained(name, models, processes, {"zero_stage": stage}, model={"dtype": dtype})
    assert ours == pytest.approx(losses, rel=loss)
    assert our_norms == pytest.approx(norms, rel=norm)
