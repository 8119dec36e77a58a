"""Small recipes on random models."""

from __future__ import annotations

from typing import Any


def off_policy(model: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """DPO: 10 pairs in batches of 4, so that every epoch ends inside a batch; 10 steps are four epochs."""
    return merged(
        {
            "objective": {"name": "dpo", "beta": 0.5},
            "model": {"path": model},
            "models": {"reference": model},
            "data": {"train": {"path": data}, "eval": {"path": data, "limit": 5}},
            "train": {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "max_steps": 10},
            "engine": {"zero_stage": 0},
            "evaluation": {"every": 4, "samples": 3, "max_new_tokens": 6},
            "checkpoint": {"every": 2},
            "logging": {"every": 3},
            "report": {"samples": 4, "max_new_tokens": 6},
        },
        sections,
    )


def on_policy(model: str, teacher: str, other: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """AlignDistil on two samples of each prompt."""
    return merged(
        {
            **off_policy(model, data),
            "objective": {"name": "aligndistil", "r": 5},
            "models": {"teacher": teacher, "reverse_teacher": other},
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2},
        },
        sections,
    )


def scoring(model: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """A reward model."""
    return merged({**off_policy(model, data), "objective": {"name": "reward_model"}, "models": {}}, sections)


def unpaired(model: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """KTO on the responses of both sides."""
    return merged({**off_policy(model, data), "objective": {"name": "kto", "beta": 0.5}}, sections)


def actor_critic(model: str, reward: str, critic: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """PPO with an adaptive coefficient: two passes of two steps over eight samples, so that the last round is cut."""
    return merged(
        {
            **off_policy(model, data),
            "objective": {"name": "ppo", "kl_coef": 0.1, "kl_target": 1.0, "kl_horizon": 40},
            "models": {"reference": model, "reward": reward, "critic": critic},
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2, "responses": 8, "epochs": 2},
        },
        sections,
    )


def three_stages(model: str, data: str, /, **sections: Any) -> dict[str, Any]:
    """A DPO model, a reverse one, and a policy between them."""
    shared = off_policy(model, data)
    for name in ("objective", "models"):
        del shared[name]
    shared["train"] = {**shared["train"], "max_steps": 3}
    dpo = {"objective": {"name": "dpo"}, "models": {"reference": model}}
    stages = {
        "dpo": dpo,
        "reverse": {**dpo, "data": {"reverse_preferences": True}},
        "policy": {
            "objective": {"name": "aligndistil", "r": 5},
            "models": {"teacher": "stage:dpo", "reverse_teacher": "stage:reverse"},
            "rollout": {"max_new_tokens": 6},
        },
    }
    return merged({**shared, "stages": stages}, sections)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        both[key] = merged(base[key], value) if nested else value
    return both
