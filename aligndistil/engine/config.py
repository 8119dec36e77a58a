"""The DeepSpeed configuration of a stage: a pure function of the recipe and the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from aligndistil import recipe
from aligndistil.errors import UserError


def deepspeed_config(
    engine: recipe.Engine, train: recipe.Train, *, accumulation: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The configuration to pass to `deepspeed.initialize`.

    Raises UserError when `engine.deepspeed` sets a key that the recipe owns.
    """
    # Without ZeRO, DeepSpeed adds up micro-batches' gradients in bfloat16; stage 1 gives the same steps in float32.
    stage = 1 if engine.zero_stage == 0 and dtype == torch.bfloat16 else engine.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
        # The optimizer is torch's AdamW: DeepSpeed's own compile C++ or CUDA code at the first step.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config, user_config(engine))


def frozen_config(engine: recipe.Engine, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration of a frozen model beside a policy that ZeRO-3 shards."""
    zero: dict[str, Any] = {"stage": 3}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


def user_config(engine: recipe.Engine) -> dict[str, Any]:
    """What the recipe adds to the configuration. Raises UserError when its file cannot be used."""
    if not isinstance(engine.deepspeed, str):
        return engine.deepspeed or {}
    path = Path(engine.deepspeed)
    try:
        user: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.deepspeed: cannot read {path} ({error.strerror}); give a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"engine.deepspeed: {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"engine.deepspeed: {path}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None
    if not isinstance(user, dict):
        raise UserError(f"engine.deepspeed: {path} holds no JSON object; give DeepSpeed's configuration, {{...}}")
    for key, owner in recipe.OWNED_DEEPSPEED_KEYS.items():
        section, _, field = key.partition(".")
        inner = user.get(section)
        if section in user and (not field or (isinstance(inner, dict) and field in inner)):
            raise UserError(f"engine.deepspeed: {path} sets {key}, which the recipe decides; set {owner} instead")
        if field and section in user and not isinstance(inner, dict):
            raise UserError(f"engine.deepspeed: {path}: {section} must be an object, not {inner!r:.40}")
    return user


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
