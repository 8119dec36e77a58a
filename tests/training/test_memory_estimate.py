"""The estimate of memory, against arithmetic and against what is really kept."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from aligndistil.engine.processes import Processes
from aligndistil.models import ModelSize, builtin_model, model_size
from aligndistil.objectives.base import Role
from aligndistil.training.memory import BUCKET, GIB, LIVE, MemoryCheck, Models, models_of
from aligndistil.training.memory import memory as estimate
from support.adapters import write_adapter
from support.estimates import PPO, small_stage

MILLION = ModelSize(
    parameters=1_000_000,
    hidden=128,
    layers=4,
    vocab=1_000,
    intermediate=512,
    q_width=128,
    kv_width=128,
    tied=True,
    linears=(("layers.0.q_proj", 128, 128), ("layers.0.down_proj", 512, 128)),
)
STATES = ("weights", "gradients", "optimizer")


def memory(stage, policy, others, processes, device="cpu", bases=None, **asked):
    return estimate(stage, Models(policy, others, bases or {}), processes, device=device, **asked)


@pytest.fixture
def stage(tmp_path):
    return small_stage(tmp_path)


def test_float32_states_are_4_bytes_of_weights_4_of_gradients_8_of_adam(stage):
    needed = memory(stage(zero_stage=0), MILLION, {Role.REFERENCE: MILLION}, processes=1)
    assert [getattr(needed, part) * GIB for part in STATES] == pytest.approx([4e6, 4e6, 8e6])
    assert needed.frozen * GIB == pytest.approx(4e6)
    assert needed.buffers == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_keeps_float32_weights_of_its_own_beside_the_two_moments(stage, zero):
    needed = memory(stage(zero_stage=zero), MILLION, {}, processes=1)
    assert needed.optimizer * GIB == pytest.approx(12e6)


def test_bfloat16_states_are_2_bytes_of_weights_4_of_gradients_12_of_adam_and_a_bucket(stage):
    bfloat16 = stage("dtype: bfloat16", zero_stage=2)
    needed = memory(bfloat16, MILLION, {Role.REFERENCE: MILLION}, 8, device="cuda")
    assert [getattr(needed, part) * GIB for part in STATES] == pytest.approx([2e6, 4e6 / 8, 12e6 / 8])
    assert needed.frozen * GIB == pytest.approx(2e6)
    assert needed.buffers * GIB == pytest.approx(2 * BUCKET)
    on_cpu = memory(bfloat16, MILLION, {Role.REFERENCE: MILLION}, 8)
    assert on_cpu.buffers == 0  # what no gradient fills is not there


def test_what_is_computed_in_depends_on_where(stage):
    chosen = stage("dtype: auto", zero_stage=2)
    assert memory(chosen, MILLION, {}, 1, device="cuda").weights * GIB == pytest.approx(2e6)
    assert memory(chosen, MILLION, {}, 1, device="cpu").weights * GIB == pytest.approx(4e6)


def test_bfloat16_without_zero_is_stage_1(stage):
    plain, first = (memory(stage("dtype: bfloat16", zero_stage=zero), MILLION, {}, processes=4) for zero in (0, 1))
    assert plain == first


@pytest.mark.parametrize(("zero", "divided"), [(1, {"optimizer"}), (2, {"optimizer", "gradients"})])
def test_zero_divides_states_over_processes(stage, zero, divided):
    whole = memory(stage(zero_stage=zero), MILLION, {}, processes=1)
    split = memory(stage(zero_stage=zero), MILLION, {}, processes=4)
    for part in STATES:
        factor = 4 if part in divided else 1
        assert getattr(split, part) == pytest.approx(getattr(whole, part) / factor)


def test_stage_3_divides_weights_and_frozen_models_too(stage):
    needed = memory(stage(zero_stage=3), MILLION, {Role.REFERENCE: MILLION}, processes=4)
    assert needed.weights * GIB == pytest.approx(1e6 + 4e6)  # a quarter, and what is gathered of so small a model
    assert needed.frozen * GIB == pytest.approx(1e6)
    large = replace(MILLION, parameters=8 * LIVE)
    assert memory(stage(zero_stage=3), large, {}, processes=8).weights * GIB == pytest.approx(4 * LIVE + 4 * LIVE)


def test_what_is_offloaded_is_not_on_the_card(stage):
    large = replace(MILLION, parameters=8 * LIVE)
    needed = memory(stage(zero_stage=2, offload="optimizer"), MILLION, {}, 1, device="cuda")
    assert (needed.gradients, needed.optimizer, needed.update) == (0, 0, 0)
    all_of_it = memory(stage(zero_stage=3, offload="parameters"), large, {Role.REFERENCE: large}, 8, device="cuda")
    assert all_of_it.weights * GIB == pytest.approx(4 * LIVE)  # what is gathered
    assert all_of_it.frozen == 0


def test_a_cached_teacher_is_its_head_alone(stage):
    needed = memory(stage(zero_stage=0, teacher_cache="true"), MILLION, {Role.REFERENCE: MILLION}, 1)
    assert needed.frozen * GIB == pytest.approx(4 * 128 * 1_000)


# ---- adapters

ADAPTERS = 16 * (128 + 128) + 16 * (512 + 128)


def test_adapters_are_all_that_has_gradients_and_moments(stage):
    needed = memory(stage("dtype: float32, lora: {r: 16}", zero_stage=0), MILLION, {}, 1)
    assert [getattr(needed, part) * GIB for part in STATES] == pytest.approx(
        [4e6 + 4 * ADAPTERS, 4 * ADAPTERS, 8 * ADAPTERS]
    )
    whole = memory(stage(zero_stage=0), MILLION, {}, 1)
    assert (whole.head - needed.head) * GIB == pytest.approx(4 * 128 * 1_000)  # the head has no gradient


def test_models_of_one_base_share_its_weights(stage):
    lora = stage("dtype: float32, lora: {r: 16}", zero_stage=0)
    same = {Role.POLICY: ("base", 0), Role.REFERENCE: ("base", 0)}
    assert memory(lora, MILLION, {Role.REFERENCE: MILLION}, 1, bases=same).frozen == 0
    adapted = {**same, Role.REFERENCE: ("base", ADAPTERS)}
    assert memory(lora, MILLION, {Role.REFERENCE: MILLION}, 1, bases=adapted).frozen * GIB == pytest.approx(
        4 * ADAPTERS
    )
    other = {**same, Role.REFERENCE: ("another", 0)}
    assert memory(lora, MILLION, {Role.REFERENCE: MILLION}, 1, bases=other).frozen * GIB == pytest.approx(4e6)
    # where all weights are trained, the reference needs its own
    assert memory(stage(zero_stage=0), MILLION, {Role.REFERENCE: MILLION}, 1, bases=same).frozen > 0


def test_models_with_another_kind_of_head_share_the_body_of_the_policy(stage):
    lora = stage("dtype: float32, lora: {r: 16}", zero_stage=0, **PPO)
    scalar = replace(MILLION, scalar=True, tied=False)
    roles = {Role.REFERENCE: MILLION, Role.REWARD: scalar, Role.CRITIC: scalar}
    bases = dict.fromkeys((Role.POLICY, *roles), ("base", 0))
    needed = memory(lora, MILLION, roles, 1, bases=bases)
    # the policy's base, with two adapters and two heads
    assert (needed.weights + needed.frozen) * GIB == pytest.approx(4e6 + 4 * (2 * ADAPTERS + 2 * scalar.head))


def test_a_folder_of_an_adapter_is_on_its_base(stage, model_folder, tmp_path):
    base = model_folder(seed=0)
    adapter = write_adapter(tmp_path / "adapter", base, seed=1)
    asked = stage("dtype: float32, lora: {r: 4}", models=f"reference: {adapter}", zero_stage=0)
    found = models_of(asked, lambda path: base if path == asked.model.path else path)
    assert {weights for weights, _ in found.bases.values()} == {base}


# ---- moments


def test_a_critic_is_trained_as_the_policy_is_and_a_reward_model_is_frozen(stage):
    alone = memory(stage(zero_stage=0), MILLION, {}, processes=1)
    roles = dict.fromkeys((Role.REFERENCE, Role.REWARD, Role.CRITIC), MILLION)
    needed = memory(stage(zero_stage=0, **PPO), MILLION, roles, processes=1)
    for part in STATES:
        assert getattr(needed, part) == pytest.approx(2 * getattr(alone, part))
    assert needed.frozen * GIB == pytest.approx(2 * 4e6)


def test_a_scalar_head_has_no_logits(stage):
    reward = stage(zero_stage=0, objective="name: reward_model", models="")
    assert memory(reward, MILLION, {}, processes=1).head == 0


def test_the_fullest_moment_is_sampling_the_backward_pass_or_the_update(stage):
    more = "rollout: {{max_new_tokens: 30, responses: 512, batch_size: {}}}"
    few, many = (stage(zero_stage=0, **{**PPO, "more": more.format(rows)}) for rows in (1, 512))

    def always(needed):
        return needed.weights + needed.optimizer + needed.buffers + needed.frozen

    learning, sampling = (memory(one, MILLION, {}, processes=1) for one in (few, many))
    assert learning.total == always(learning) + learning.gradients + learning.activations + learning.head
    assert sampling.total == always(sampling) + sampling.rollout  # before there are gradients
    sharded = stage(zero_stage=2, **{**PPO, "more": more.format(1)})
    large = memory(sharded, replace(MILLION, parameters=10**9), {}, processes=1, device="cuda")
    assert large.is_of_update
    assert large.update * GIB == pytest.approx(4e9)  # ZeRO's flat copy of the gradients
    assert large.total == always(large) + large.gradients + large.update


def test_a_larger_card_is_given_larger_chunks_and_keeps_more_softmaxes(stage):
    asked = stage("dtype: bfloat16", zero_stage=2)
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"max_response_length": 8000})})
    wide = replace(MILLION, vocab=150_000)
    small, large = (memory(asked, wide, {}, 1, device="cuda", card=gib).head for gib in (24.0, 80.0))
    assert small < large
    given = asked.model_copy(update={"engine": asked.engine.model_copy(update={"chunk_tokens": 128})})
    assert memory(given, wide, {}, 1, device="cuda", card=24.0).head < small


def test_gradients_of_one_micro_batch_come_as_its_activations_go(stage):
    once = memory(stage(zero_stage=0), MILLION, {}, processes=4)
    several = memory(stage(zero_stage=0), MILLION, {}, processes=2)
    assert several.total - once.total == pytest.approx(once.gradients)


def test_moments_that_the_first_update_makes_come_after_the_activations(stage):
    needed = memory(stage(zero_stage=0), MILLION, {}, processes=1)
    assert needed.first_step().total < needed.total
    assert needed.first_step().update == needed.update + needed.optimizer


def test_pairs_that_share_their_prompt_keep_it_once(stage):
    both, apart = (stage(zero_stage=0, share_prompts=share) for share in ("auto", "never"))
    data = both.data.model_copy(update={"max_prompt_length": 600, "max_response_length": 200})
    once, twice = (
        memory(one.model_copy(update={"data": data}), replace(MILLION, hidden=4096), {}, 1, device="cuda").activations
        for one in (both, apart)
    )
    assert once / twice == pytest.approx((600 + 2 * 200) / (2 * 800))


def test_shorter_rows_take_less(stage):
    asked = stage(zero_stage=0)
    whole, half = (memory(asked, MILLION, {}, 1, tokens=tokens) for tokens in (50, 25))
    assert half.activations == pytest.approx(whole.activations / 2)
    assert memory(asked, MILLION, {}, 1) == whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(stage, dtype, checkpointing):
    alone = {"zero_stage": 0, "share_prompts": "never"}
    asked = stage(f"dtype: {dtype}, gradient_checkpointing: {str(checkpointing).lower()}", **alone)
    size, rows, tokens = model_size("builtin:tiny"), 2 * 2, 20 + 30
    model = AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"), dtype=getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in weights)
    estimated = memory(asked, size, {}, processes=1).activations * GIB
    # While it is recomputed, one layer is kept as a whole.
    whole, deeper = stage(f"dtype: {dtype}", **alone), replace(size, layers=size.layers + 1)
    layer = (
        memory(whole, deeper, {}, processes=1).activations - memory(whole, size, {}, processes=1).activations
    ) * GIB
    assert estimated - layer * checkpointing == pytest.approx(measured, rel=0.05)


def test_generation_is_the_cache_of_the_rows_that_are_decoded_at_once(stage):
    config = AutoConfig.from_pretrained(builtin_model("builtin:tiny"))
    model = AutoModelForCausalLM.from_config(config)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.zeros(4, 20 + 30, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    size = model_size("builtin:tiny")
    needed = memory(stage(zero_stage=0, **PPO), size, {}, processes=1)
    assert needed.rollout * GIB == pytest.approx(real + 4 * size.vocab * 28)


# ---- the check


@pytest.fixture
def checked(stage, monkeypatch):
    """What the check says where the peak is a multiple of the estimate, on a device."""

    def check(times, device="cuda", step=1):
        asked, models = stage(zero_stage=2), Models(MILLION)
        needed = estimate(asked, models, 1, device=device, tokens=10)
        monkeypatch.setattr("aligndistil.training.memory.peak_memory_gib", lambda: 3 + times * needed.total)
        processes = Processes(0, 1, torch.device(device))
        metrics = MemoryCheck(asked, models, processes, held=3.0).after_step(step, 10)
        assert metrics == {"perf/estimated_memory_gib": needed.total}

    return check


@pytest.mark.parametrize(
    ("times", "device", "level"),
    [
        (1.0, "cuda", "INFO"),
        (1.3, "cuda", "INFO"),
        (1.4, "cuda", "WARNING"),
        (0.7, "cuda", "WARNING"),
        (2, "cpu", "INFO"),
    ],
)
def test_the_first_step_is_compared_in_one_line(checked, caplog, monkeypatch, times, device, level):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("aligndistil.training.memory.COARSE", 0.0)
    checked(times, device)
    (line,) = [record for record in caplog.records if "estimated were" in record.getMessage()]
    assert line.levelname == level
    assert "rows of up to 10 tokens" in line.getMessage()
    assert f"({1 / times - 1:+.0%})".replace("%", " %") in line.getMessage()


def test_a_few_megabytes_of_a_cpu_are_not_compared(checked, caplog):
    caplog.set_level(logging.INFO)
    checked(3, "cpu")
    assert "estimated were" not in caplog.text


def test_the_estimate_is_for_the_longest_rows_so_far_and_compared_once(stage, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("aligndistil.training.memory.COARSE", 0.0)
    asked, models = stage(zero_stage=0), Models(MILLION)
    check = MemoryCheck(asked, models, Processes(0, 1, torch.device("cpu")), held=0.0)
    first, second, third = (check.after_step(step, tokens) for step, tokens in enumerate((8, 40, 8), 1))
    assert (
        first["perf/estimated_memory_gib"] < second["perf/estimated_memory_gib"] == third["perf/estimated_memory_gib"]
    )
    assert len([record for record in caplog.records if "estimated were" in record.getMessage()]) == 1
