"""When a finished stage still stands for its recipe, and what changed when it does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from aligndistil.recipe.stage import Stage

SECTIONS_OF_RESULT = ("objective", "model", "models", "data", "rollout", "train", "engine")
"""Sections that change the weights a stage ends with. Evaluation, checkpoints and logging only look at them.

A trained reward is more than weights: its scale is measured on eval data, see `_of_result`.
"""

NOT_OF_RESULT = {
    "data": {"eval", "workers"},
    "model": {"gradient_checkpointing"},
    "rollout": {"batch_size"},
    "train": {"micro_batch_size", "micro_batch_tokens"},
    "engine": {
        "zero_stage",
        "offload",
        "chunk_tokens",
        "compile",
        "share_prompts",
        "teacher_cache",
        "stop_timeout",
        "timeout_minutes",
    },
}
"""Their fields that do not: they say how the same numbers are computed, and on what.

Eval data that are held out of the training data do change it, see `_of_result`.
"""

_ABSENT = object()


def stage_fingerprint(
    stage: Stage, input_weights: Mapping[str, str], content_hashes: Mapping[str, str], version: str
) -> str:
    """SHA-256 of everything that decides the weights a stage ends with, in hexadecimal.

    `input_weights` are hashes of the final models of the stages in `stage.inputs`, `content_hashes` those of data,
    files and models by what names them, and `version` changes when the same recipe no longer gives the same weights.
    """
    content = {
        "version": version,
        "sections": _of_result(stage.resolved(), stage.objective.is_scalar),
        "inputs": dict(input_weights),
        "contents": dict(content_hashes),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_sections(old: Mapping[str, Any], new: Mapping[str, Any], *, scalar: bool = False) -> list[str]:
    """Sentences such as "train.learning_rate changed from 0.001 to 0.002", from two results of `Stage.resolved`.

    `scalar` says that the stage trains a reward.
    """
    return list(_changes("", _of_result(old, scalar), _of_result(new, scalar)))


def _of_result(resolved: Mapping[str, Any], scalar: bool) -> dict[str, Any]:
    """What decides the stage's final model; of a reward also what its mean and deviation are measured on."""
    sections = {name: resolved.get(name) for name in SECTIONS_OF_RESULT}
    for name, others in NOT_OF_RESULT.items():
        section = sections[name]
        if section is not None:
            sections[name] = {key: value for key, value in section.items() if key not in others}
    data = resolved.get("data") or {}
    if isinstance(data.get("eval"), Mapping):  # a share of the training data
        sections["data"] = {**(sections["data"] or {}), "eval": data["eval"]}
    if scalar:
        sections["data"] = {**(sections["data"] or {}), "eval": resolved["data"]["eval"]}
        sections["evaluation"] = {"limit": resolved["evaluation"]["limit"]}
    return sections


def _changes(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            below = f"{path}.{key}" if path else key
            yield from _changes(below, old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes(f"{path}.{i}", before, after)
    elif old is _ABSENT or (old is None and isinstance(new, dict)):
        yield f"{path} was added"
    elif new is _ABSENT or (new is None and isinstance(old, dict)):
        yield f"{path} was removed"
    elif old != new:
        yield f"{path} changed from {_shown(old)} to {_shown(new)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
