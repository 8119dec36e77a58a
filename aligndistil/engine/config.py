"""The DeepSpeed configuration of a stage: a pure function of the recipe and the number of processes."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from aligndistil import recipe
from aligndistil.errors import MissingError, UserError, did_you_mean, listed, of_the_system, out_of_memory, shortened


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
    if engine.deepspeed.lstrip().startswith("{"):
        raise UserError("engine.deepspeed: write the mapping itself, without quotes, or the path of a JSON file")
    path = Path(engine.deepspeed)
    try:
        user: Any = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins, parse_constant=_no_constant
        )
    except OSError as error:
        raise UserError(f"engine.deepspeed: cannot read {path} ({error.strerror}); give a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"engine.deepspeed: {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"engine.deepspeed: {path}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"engine.deepspeed: {path}: {str(error).split(';')[0]}") from None
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


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twins = [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]
        raise ValueError(f"{listed(twins)} is given twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def check_deepspeed(stage: recipe.Stage, dtype: torch.dtype) -> None:
    """Whether DeepSpeed takes what a stage adds to its configuration, of which it overlooks the keys it does not know.

    Raises UserError where it does not, MissingError where it is not installed.
    """
    user = user_config(stage.engine)
    if not user:
        return
    import_deepspeed()
    configuration = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig
    ours = deepspeed_config(recipe.Engine(zero_stage=stage.engine.zero_stage), stage.train, accumulation=1, dtype=dtype)
    usual = configuration(copy.deepcopy(ours))
    for key, given in user.items():
        config = _Noting(_merge(ours, {key: given}))
        with refused_by_deepspeed(stage.engine, f"{key}: {shortened(json.dumps(given))}"):
            configuration(config)
        _refuse_unknown(config, key, key)
        section = config[key]
        if isinstance(section, _Noting) and section.asked:
            try:  # some sections refuse what they do not know; the others ask for each key that they do
                configuration(_merge(ours, {key: {"of nobody": 0}}))
            except ValidationError:
                continue
            for inner in given:
                _refuse_unknown(section, inner, f"{key}.{inner}")
        default = getattr(usual, key, None)
        wrong = ""
        if isinstance(default, bool):
            wrong = "" if isinstance(given, bool) else "true or false"
        elif isinstance(default, int | float) and not (isinstance(given, int | float) and given > 0):
            wrong = "a number above 0"
        if wrong:
            raise UserError(f"engine.deepspeed: {key} must be {wrong}, not {shortened(json.dumps(given))}")
    with refused_by_deepspeed(stage.engine):
        configuration(deepspeed_config(stage.engine, stage.train, accumulation=1, dtype=dtype))


def _refuse_unknown(config: _Noting, key: str, shown: str) -> None:
    if key not in config.asked:
        raise UserError(
            f"engine.deepspeed: DeepSpeed knows no `{shown}`, and would overlook it{did_you_mean(key, config.asked)}"
        )


@contextmanager
def refused_by_deepspeed(engine: recipe.Engine, what: str = "this") -> Iterator[None]:
    """Where the recipe adds to the configuration, errors of DeepSpeed are about that: it checks few values itself."""
    try:
        yield
    except Exception as error:
        if not user_config(engine) or isinstance(error, UserError) or out_of_memory(error) or of_the_system(error):
            raise
        said = "; ".join(line.strip() for line in str(error).splitlines()[:1])
        if isinstance(error, ValidationError):
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UserError(f"engine.deepspeed: DeepSpeed does not take {what}: {said or type(error).__name__}") from error


class _Noting(dict[str, Any]):
    """A configuration that notes which keys are asked for; its copies note into the same set."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__({key: _Noting(one) if isinstance(one, dict) else one for key, one in given.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def import_deepspeed() -> Any:
    """DeepSpeed, without its C++ kernels. Raises MissingError where it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise MissingError(
            f"training needs DeepSpeed, which cannot be imported ({error}); install it with `pip install deepspeed`"
        ) from error
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed would compile a C++ kernel for CPU collectives, even for one process; gloo does without.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
