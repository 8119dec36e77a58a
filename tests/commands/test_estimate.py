"""Estimates against what is really there, and against arithmetic."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from aligndistil.commands.estimate import (
    BUCKET,
    GIB,
    KNOWN_MODELS,
    ModelSize,
    cost,
    cost_at_most,
    memory,
    model_size,
)
from aligndistil.commands.plan import plan
from aligndistil.commands.recipes import shipped_recipes
from aligndistil.models import builtin_model
from aligndistil.objectives.base import Role
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import StageFolder
from aligndistil.training import StageTraining, load_stage_data

MILLION = ModelSize(parameters=1_000_000, hidden=128, layers=4, vocab=1_000, intermediate=512, kv_width=128)
RECIPES = shipped_recipes()
STATES = ("weights", "gradients", "optimizer")


@pytest.fixture
def stage(tmp_path):
    def make(model="dtype: float32", objective="name: dpo", models="reference: builtin:tiny", more="", **engine):
        text = f"""
model: {{path: builtin:tiny, {model}}}
objective: {{{objective}}}
models: {{{models}}}
data: {{train: {{path: builtin:reviews, limit: 100}}, max_prompt_length: 20, max_response_length: 30}}
train: {{batch_size: 8, micro_batch_size: 2}}
engine: {{{", ".join(f"{key}: {value}" for key, value in engine.items())}}}
{more}
"""
        (tmp_path / "recipe.yaml").write_text(text)
        return next(iter(load_recipe(tmp_path / "recipe.yaml").stages.values()))

    return make


PPO = {
    "objective": "name: ppo",
    "models": "reference: builtin:tiny, reward: builtin:tiny, critic: builtin:tiny",
    "more": "rollout: {max_new_tokens: 30, responses: 32, epochs: 2, batch_size: 4}",
}


# ---- sizes


def test_parameters_are_counted_without_loading_weights():
    real = AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"))
    assert model_size("builtin:tiny").parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("path", ["Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"])
def test_the_models_of_the_paper_are_known_without_the_hub(path):
    # embedding 151,936 x 1,536, tied with the head: 233,373,696
    # a layer: q 2,360,832 + k, v 786,944 + o 2,359,296 + feed-forward 3 x 1,536 x 8,960 + norms 3,072 = 46,797,824
    # 28 layers, the last norm 1,536
    size = model_size(path)
    assert size.parameters == 233_373_696 + 28 * 46_797_824 + 1_536
    assert (size.hidden, size.layers, size.vocab, size.intermediate, size.kv_width) == (1536, 28, 151_936, 8960, 256)
    # tied, so that a scalar head takes nothing away
    assert model_size(path, scalar=True).parameters == size.parameters + 1536


def test_what_shipped_recipes_name_on_the_hub_is_known():
    named = {stage.model.path for path in RECIPES.values() for stage in load_recipe(path).stages.values()}
    on_hub = {path for path in named if not path.startswith(("builtin:", "stage:", "models/"))}
    assert on_hub == KNOWN_MODELS.keys()


# ---- memory


def test_float32_states_are_4_bytes_of_weights_4_of_gradients_8_of_adam(stage):
    needed = memory(stage(zero_stage=0), MILLION, {Role.REFERENCE: MILLION}, processes=1)
    assert [getattr(needed, part) * GIB for part in STATES] == pytest.approx([4e6, 4e6, 8e6])
    assert needed.frozen * GIB == pytest.approx(4e6)
    assert needed.buffers == 0


def test_bfloat16_states_are_2_bytes_of_weights_4_of_gradients_12_of_adam_and_a_bucket(stage):
    bfloat16 = stage("dtype: bfloat16", zero_stage=2)
    needed = memory(bfloat16, MILLION, {Role.REFERENCE: MILLION}, processes=8)
    assert [getattr(needed, part) * GIB for part in STATES] == pytest.approx([2e6, 4e6 / 8, 12e6 / 8])
    assert needed.frozen * GIB == pytest.approx(2e6)
    assert needed.buffers * GIB == pytest.approx(2 * BUCKET)


def test_bfloat16_without_zero_is_stage_1(stage):
    plain, first = (memory(stage("dtype: bfloat16", zero_stage=zero), MILLION, {}, processes=4) for zero in (0, 1))
    assert plain == first


@pytest.mark.parametrize(("zero", "divided"), [(1, {"optimizer"}), (2, {"optimizer", "gradients"})])
def test_zero_divides_states_over_processes(stage, zero, divided):
    whole = memory(stage(zero_stage=0), MILLION, {}, processes=4)
    split = memory(stage(zero_stage=zero), MILLION, {}, processes=4)
    for part in STATES:
        factor = 4 if part in divided else 1
        assert getattr(split, part) == pytest.approx(getattr(whole, part) / factor)


def test_stage_3_divides_weights_and_frozen_models_too(stage):
    needed = memory(stage(zero_stage=3), MILLION, {Role.REFERENCE: MILLION}, processes=4)
    assert needed.weights * GIB == pytest.approx(1e6)
    assert needed.frozen * GIB == pytest.approx(1e6)


def test_a_critic_is_trained_as_the_policy_is_and_a_reward_model_is_frozen(stage):
    alone = memory(stage(zero_stage=0), MILLION, {}, processes=1)
    roles = dict.fromkeys((Role.REFERENCE, Role.REWARD, Role.CRITIC), MILLION)
    needed = memory(stage(zero_stage=0, **PPO), MILLION, roles, processes=1)
    for part in STATES:
        assert getattr(needed, part) == pytest.approx(2 * getattr(alone, part))
    assert needed.frozen * GIB == pytest.approx(2 * 4e6)


def test_a_scalar_head_has_no_logits(stage):
    reward = stage(zero_stage=0, objective="name: reward_model", models="")
    assert memory(reward, MILLION, {}, processes=1).logits == 0


def test_the_fullest_moment_is_the_update_or_the_sampling(stage):
    needed = memory(stage(zero_stage=0, **PPO), MILLION, {}, processes=1)
    states = needed.weights + needed.gradients + needed.optimizer + needed.buffers + needed.frozen
    assert needed.total == states + max(needed.activations + needed.logits, needed.generation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(stage, dtype, checkpointing):
    asked = stage(f"dtype: {dtype}, gradient_checkpointing: {str(checkpointing).lower()}", zero_stage=0)
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
    whole, deeper = stage(f"dtype: {dtype}", zero_stage=0), replace(size, layers=size.layers + 1)
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
    assert needed.generation * GIB == pytest.approx(real + 4 * size.vocab * 16)


# ---- steps and tokens


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("quickstart")])
def test_steps_are_those_that_training_takes(name, processes, tmp_path):
    for stage in load_recipe(RECIPES[name]).stages.values():
        launch = StageTraining(stage, StageFolder(tmp_path), lambda path: "builtin:tiny", processes)
        assert cost(stage, launch.data.train).steps == launch.schedule.total_steps


def test_a_rollout_of_several_steps_samples_once(stage):
    # 100 prompts in rollouts of 32 are 4 rollouts, each for 2 passes of 4 steps of 8
    taken = cost_at_most(stage(**PPO))
    assert (taken.examples, taken.steps) == (100, 4 * 2 * 4)
    assert taken.sampled == 4 * 32 * 30
    assert taken.tokens == 32 * 8 * 20


def test_bounds_are_not_below_what_the_data_hold(stage):
    for one in (stage(), stage(objective="name: kto"), stage(**PPO)):
        exact, most = cost(one, load_stage_data(one, str).train), cost_at_most(one)
        assert (exact.examples, exact.steps, exact.kind) == (most.examples, most.steps, most.kind)
        assert exact.tokens <= most.tokens
        assert (exact.exact, most.exact) == (True, False)


def test_rows_that_nobody_knows_have_no_bound(stage):
    unknown = stage()
    source = unknown.data.train[0].model_copy(update={"path": "nobody/knows"})
    data = unknown.data.model_copy(update={"train": [source]})
    assert cost_at_most(unknown.model_copy(update={"data": data})) is None


def test_a_dry_run_of_the_paper_needs_no_hub_and_no_weights():
    recipe = load_recipe(RECIPES["paper/qwen2/table1"])
    lines = [str(line) for line in plan(recipe, None, processes=8)]
    blocks = {
        lines[i].split("[/]")[0].removeprefix("[bold]"): lines[i + 1 : i + 4] for i in range(0, len(lines) - 2, 4)
    }
    assert list(blocks) == list(recipe.stages)
    for name, (models, data, needed) in blocks.items():
        stage = recipe.stages[name]
        assert models.count("(1,543.7 M)") == 1 + len(stage.models)
        # 61,135 pairs / 128; 60 rollouts of 1,024 for 8 steps each; KTO has two rows a pair
        steps = {"kto": 956, "ppo": 480, "rto": 480}.get(name, 478)
        assert f"{steps} steps of 128, at most " in data
        assert data.startswith("  data    at most ")
        assert ("sampled" in data) == stage.on_policy
        assert "GiB a process" in needed
    assert "The Hub cannot be reached" in lines[-2]
    assert "unknown" not in "".join(lines)


def test_a_plan_of_what_only_the_hub_knows_says_so(recipe_file):
    path = recipe_file(
        {
            "model": {"path": "nobody/knows"},
            "objective": {"name": "dpo"},
            "models": {"reference": "nobody/knows"},
            "data": {"train": {"path": "nobody/has"}},
        }
    )
    lines = list(plan(load_recipe(path), None, processes=1))
    assert "unknown" in lines[1]
    assert "cannot be reached" in lines[2]
    assert not any("GiB" in line for line in lines)
