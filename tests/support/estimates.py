"""Stages whose cost and memory are estimated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aligndistil.recipe import Stage, load_recipe


def small_stage(folder: Path) -> Callable[..., Stage]:
    """DPO on `builtin:tiny`, but for what is asked for; keyword arguments are of the section `engine`."""

    def make(
        model: str = "dtype: float32",
        objective: str = "name: dpo",
        models: str = "reference: builtin:tiny",
        more: str = "",
        **engine: object,
    ) -> Stage:
        text = f"""
model: {{path: builtin:tiny, {model}}}
objective: {{{objective}}}
models: {{{models}}}
data: {{train: {{path: builtin:reviews, limit: 100}}, max_prompt_length: 20, max_response_length: 30}}
train: {{batch_size: 8, micro_batch_size: 2}}
engine: {{{", ".join(f"{key}: {value}" for key, value in engine.items())}}}
{more}
"""
        (folder / "recipe.yaml").write_text(text)
        return next(iter(load_recipe(folder / "recipe.yaml").stages.values()))

    return make


PPO = {
    "objective": "name: ppo",
    "models": "reference: builtin:tiny, reward: builtin:tiny, critic: builtin:tiny",
    "more": "rollout: {max_new_tokens: 30, responses: 32, epochs: 2, batch_size: 4}",
}
