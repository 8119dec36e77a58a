"""What is said of a stage's models before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from aligndistil.recipe import load_recipe
from aligndistil.training import model_lines
from support.recipes import actor_critic, off_policy, on_policy

SAYS = "model {} is a mixture of {} experts, and its load-balancing loss is not trained with"


@pytest.mark.parametrize(
    ("kind", "fields", "experts"),
    [
        ("llama", {}, 0),
        ("mixtral", {}, 8),
        ("mixtral", {"num_local_experts": 1}, 0),
        ("qwen2_moe", {"num_experts": 6}, 6),
        ("deepseek_v3", {"n_routed_experts": 16}, 16),
        ("dbrx", {}, 4),  # a configuration inside the configuration says so
        ("gemma4_text", {}, 0),  # has the field, and no experts
    ],
)
def test_a_mixture_of_experts_is_trained_without_its_balancing_loss(
    kind: str, fields: dict[str, Any], experts: int, tmp_path: Path, recipe_file: Callable[..., Path]
) -> None:
    folder = tmp_path / "m"
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    (stage,) = load_recipe(recipe_file(off_policy(str(folder), "pairs.jsonl"))).stages.values()
    lines = model_lines(stage, lambda path: path)
    assert [line.startswith(SAYS.format(folder, experts)) for line in lines] == [True] * (experts > 1)


def test_each_trained_model_is_looked_at_and_no_other(tmp_path: Path, recipe_file: Callable[..., Path]) -> None:
    folders = [str(tmp_path / name) for name in ("policy", "reward", "critic")]
    for number, folder in enumerate(folders, start=2):
        AutoConfig.for_model("mixtral", num_local_experts=number).save_pretrained(folder)
    (stage,) = load_recipe(recipe_file(actor_critic(*folders, "pairs.jsonl"))).stages.values()
    lines = model_lines(stage, lambda path: path)
    assert [
        line.startswith(SAYS.format(folders[place], place + 2)) for place, line in zip((0, 2), lines, strict=True)
    ] == [True] * 2


@pytest.mark.parametrize(
    ("make", "rollout", "says"),
    [
        (actor_critic, {}, None),
        (actor_critic, {"temperature": 1.0, "top_p": 1.0}, None),
        (actor_critic, {"temperature": 0.5}, "the policy at this temperature is trained: sample it so"),
        (on_policy, {}, None),
        (on_policy, {"temperature": 0.5}, "what is learnt of each stays the same"),
        (on_policy, {"top_p": 0.9}, "what is learnt of each stays the same"),
        (off_policy, None, None),
    ],
)
def test_it_is_said_what_another_temperature_does(
    make: Callable[..., Any],
    rollout: dict[str, Any] | None,
    says: str | None,
    tmp_path: Path,
    recipe_file: Callable[..., Path],
) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "m")
    models = [str(tmp_path / "m")] * (1 if rollout is None else 3)
    content = make(*models, "pairs.jsonl", **({} if rollout is None else {"rollout": rollout}))
    (stage,) = load_recipe(recipe_file(content)).stages.values()
    lines = model_lines(stage, lambda path: path)
    assert [says in line for line in lines] == ([] if says is None else [True])
