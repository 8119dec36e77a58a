"""Training logs as they lie on disk: ours (metrics.jsonl), and transformers' and TRL's (trainer_state.json).

Also what their metrics are: which are known, and which say something of the policy only on its own samples.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aligndistil.errors import UserError
from aligndistil.objectives import registry
from aligndistil.objectives.base import MetricInfo
from aligndistil.objectives.loop_metrics import (
    CRITIC_METRICS,
    EVALUATION_METRICS,
    GOLD_REWARD,
    LOOP_METRICS,
    ROLLOUT_METRICS,
)
from aligndistil.run_folder import Done
from aligndistil.run_folder.metrics import MetricsLog

METRICS = "metrics.jsonl"
STATE = "trainer_state.json"
OURS = {
    "num_input_tokens_seen": "num_tokens",
    "step_time": "perf/step_seconds",
    "completions/clipped_ratio": "completions/truncated_fraction",
}
"""What transformers and TRL call differently; the rest of their names are ours."""
BOOKKEEPING = ("step", "split")
"""What a line has beside metrics."""
EVAL = "eval/"
"""What stands before the name of an evaluation's metric."""
SUMMARY = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos")


@dataclass(frozen=True, slots=True)
class Log:
    """The metrics of one training: one stage of a run, or one output folder of transformers."""

    path: Path
    """The file that was read."""
    run: str
    stage: str
    """Empty where a run has no stages."""
    seed: str
    """`seed-0`; empty where there are no seeds."""
    group: Path
    """Logs of the same group and stage differ in their seed only."""
    lines: list[dict[str, Any]]
    """In the form of metrics.jsonl, finite numbers only; one line a step and split, in the order of steps."""


def read_logs(path: Path) -> list[Log]:
    """Everything that `path` holds, seeds in order.

    A run folder gives its stages (archived ones apart), a folder with seed-*/ the same of every seed, and FOLDER/STAGE
    that stage of every seed. Also a stage folder, a metrics.jsonl, an output folder of transformers or TRL and a
    trainer_state.json. Raises UserError when it is none of these, or cannot be read.
    """
    if path.is_file():
        return [_read(path)]
    logs = _in_folder(path)
    for seed in () if path.exists() else seed_folders(path.parent):
        logs += _in_folder(seed / path.name)
    if logs:
        return logs
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    raise UserError(
        f"{path} holds no training log: give a run folder, a stage folder, a {METRICS}, "
        f"or an output folder of TRL with its {STATE}"
    )


def _in_folder(path: Path) -> list[Log]:
    # `Trainer.train` alone leaves no state but that of its checkpoints.
    states = [folder / STATE for folder in (path, *reversed(_numbered(path, "checkpoint")))]
    for file in (path / METRICS, *states):
        if file.is_file():
            return [_read(file)]
    seeds = seed_folders(path)
    # A stage that was trained again is kept as STAGE.old-1; a stage's name has no dot.
    stages = [file for file in sorted(path.glob(f"*/{METRICS}")) if "." not in file.parent.name]
    logs = [_read(file) for file in stages if file.parent not in seeds]
    return logs + [log for seed in seeds for log in _in_folder(seed)]


def seed_folders(path: Path) -> list[Path]:
    """`path`/seed-0, seed-1 ..., in order."""
    return _numbered(path, "seed")


def _numbered(path: Path, kind: str) -> list[Path]:
    """The folders `path`/KIND-NUMBER, in the order of their numbers."""
    found = [folder for folder in path.glob(f"{kind}-*") if _is_numbered(folder, kind) and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def _is_numbered(folder: Path, kind: str) -> bool:
    return re.fullmatch(rf"{kind}-\d+", folder.name) is not None


def _read(path: Path) -> Log:
    """One file: transformers' where it ends in .json, else ours."""
    theirs = path.suffix == ".json"
    try:
        if theirs:
            history = json.loads(path.read_bytes())["log_history"]
            # The summary that ends a training is no step.
            lines = _tidy([_translated(entry) for entry in history if "train_runtime" not in entry])
        else:
            lines = _tidy(MetricsLog(path).read())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = f"a {STATE} of transformers: it has no `log_history` of steps" if theirs else f"a {METRICS}"
        raise UserError(f"{path} is not {form}") from error
    folder, stage = path.resolve().parent, ""
    if not theirs and path.name != METRICS:  # a copy, which may lie anywhere
        return Log(path, folder.name, path.stem, "", folder / path.name, lines)
    if theirs and _is_numbered(folder, "checkpoint"):
        folder = folder.parent
    elif not theirs and not _is_numbered(folder, "seed"):
        folder, stage = folder.parent, folder.name
    seed, group = (folder.name, folder.parent) if _is_numbered(folder, "seed") else ("", folder)
    return Log(path, group.name, stage, seed, group, lines)


def _translated(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `log_history` as a line of ours."""
    told = {name: value for name, value in entry.items() if name not in SUMMARY}
    evaluated = {name.removeprefix("eval_"): value for name, value in told.items() if name.startswith("eval_")}
    metrics = {OURS.get(name, name): value for name, value in (evaluated or told).items()}
    return metrics | {"step": entry["step"], "split": "eval" if evaluated else "train"}


def _tidy(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Finite numbers only, one line a step and split: what was logged later is added to what was logged before."""
    kept: dict[tuple[float, str], dict[str, Any]] = {}
    for line in lines:
        step, split = float(line["step"]), line.get("split", "train")
        numbers = {name: float(value) for name, value in line.items() if type(value) in (int, float)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        kept.setdefault((step, split), {}).update(finite | {"step": step, "split": split})
    return [kept[key] for key in sorted(kept)]


# ---- what their metrics are


@functools.cache
def known_metrics() -> dict[str, MetricInfo]:
    """Every metric that the loop or a registered objective declares."""
    declared = [LOOP_METRICS, CRITIC_METRICS, ROLLOUT_METRICS, EVALUATION_METRICS, GOLD_REWARD]
    declared += [dict(objective.metrics) for objective in registry().values()]
    return {name: info for metrics in declared for name, info in metrics.items()}


def split_and_name(metric: str) -> tuple[str, str]:
    """`eval/loss` is ("eval", "loss"); without a prefix, and with `train/`, it is what training logged."""
    return ("eval", metric.removeprefix(EVAL)) if metric.startswith(EVAL) else ("train", metric.removeprefix("train/"))


def metric_info(metric: str) -> MetricInfo:
    """Any metric, `eval/...` included, with title and axis; one that is not known is drawn under its own name."""
    split, name = split_and_name(metric)
    info = known_metrics().get(name, MetricInfo("", ""))
    title = (info.title or name) + (" (evaluation)" if split == "eval" else "")
    return info._replace(title=title, axis=info.axis or (f"{name} ({info.unit})" if info.unit else name))


def sampled(line: Mapping[str, Any]) -> bool:
    """Whether the objective's terms are of the policy's own samples; those of an evaluation are of the eval data's."""
    return line["split"] == "train" and any(name.startswith("completions/") for name in line)


def off_policy(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rewards and divergences are of given responses: another quantity than of the policy's own."""
    return any("reward/token_mean" in line for line in lines) and not any(sampled(line) for line in lines)


def values_of(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[float, float]:
    """A metric (`eval/...`: of the evaluations) by step; none where it would not depend on the policy."""
    split, name = split_and_name(metric)
    on_samples = name in known_metrics() and known_metrics()[name].on_samples
    there = (line for line in lines if line["split"] == split and name in line)
    return {line["step"]: line[name] for line in there if not on_samples or sampled(line)}


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Seconds of training so far, by step: rollouts included, evaluations and checkpoints not."""
    seconds = values_of(lines, "perf/step_seconds")
    # A log that is not of every step stands for the steps since its last line.
    steps = np.diff(list(seconds), prepend=0.0)
    return dict(zip(seconds, np.cumsum(steps * list(seconds.values())).tolist(), strict=True))


def training_metrics(done: Done | None, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Steps and seconds of done.json; tokens/s and largest peak memory of the training lines of metrics.jsonl.

    Tokens/s are all tokens over all seconds of steps, rollouts included: where several steps share a rollout, the
    speed of a typical step says nothing of it.
    """
    found = {} if done is None else {"steps": float(done.step), "seconds": done.seconds}
    tokens, seconds = list(values_of(lines, "num_tokens").values()), list(step_seconds(lines).values())
    if tokens and seconds and seconds[-1]:
        found["tokens_per_second"] = tokens[-1] / seconds[-1]
    if peaks := values_of(lines, "perf/peak_memory_gib").values():
        found["peak_memory_gib"] = max(peaks)
    return found
