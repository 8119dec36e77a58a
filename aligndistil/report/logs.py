"""Training logs as they lie on disk: ours (metrics.jsonl), and transformers' and TRL's (trainer_state.json).

Also what their metrics are: which are known, and which say something of the policy only on its own samples.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
EVAL = "eval/"
"""What stands before the name of an evaluation's metric."""
SUMMARY = ("train_runtime", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos")


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
        return [_theirs(path) if path.suffix == ".json" else _ours(path)]
    logs = _in_folder(path) if path.is_dir() else []
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
    if (path / METRICS).is_file():
        return [_ours(path / METRICS)]
    if (state := _trainer_state(path)) is not None:
        return [_theirs(state)]
    # A stage that was trained again is kept as STAGE.old-1; a stage's name has no dot.
    stages = [found for found in sorted(path.glob(f"*/{METRICS}")) if "." not in found.parent.name]
    seeds = seed_folders(path)
    logs = [_ours(found) for found in stages if found.parent not in seeds]
    for seed in seeds:
        logs += _in_folder(seed)
    return logs


def seed_folders(path: Path) -> list[Path]:
    """`path`/seed-0, seed-1 ..., in order."""
    found = [folder for folder in path.glob("seed-*") if _is_seed(folder.name) and folder.is_dir()]
    return sorted(found, key=lambda folder: _number(folder.name))


def _is_seed(name: str) -> bool:
    return re.fullmatch(r"seed-\d+", name) is not None


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _trainer_state(folder: Path) -> Path | None:
    """Of the whole training, or of its last checkpoint: `Trainer.train` alone writes no other."""
    checkpoints = [
        state for state in folder.glob(f"checkpoint-*/{STATE}") if re.fullmatch(r"checkpoint-\d+", state.parent.name)
    ]
    last = max(checkpoints, key=lambda state: _number(state.parent.name), default=None)
    return folder / STATE if (folder / STATE).is_file() else last


def _ours(path: Path) -> Log:
    folder = path.resolve().parent
    try:
        lines = _tidy(MetricsLog(path).read())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a {METRICS}: each line must be a JSON object with a `step`") from error
    if path.name != METRICS:
        return Log(path, folder.name, path.stem, "", folder / path.name, lines)
    if _is_seed(folder.name):
        return Log(path, folder.parent.name, "", folder.name, folder.parent, lines)
    run = folder.parent
    seed = run.name if _is_seed(run.name) else ""
    group = run.parent if seed else run
    return Log(path, group.name, folder.name, seed, group, lines)


def _theirs(path: Path) -> Log:
    folder = path.resolve().parent
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        folder = folder.parent
    try:
        history = json.loads(path.read_bytes())["log_history"]
        lines = _tidy([part for entry in history for part in _translated(entry)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a {STATE} of transformers: it has no `log_history` of steps") from error
    seed = folder.name if _is_seed(folder.name) else ""
    group = folder.parent if seed else folder
    return Log(path, group.name, "", seed, group, lines)


def _translated(entry: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One entry of `log_history` as lines of ours. The summary that ends a training is left out: it is no step's."""
    if "train_runtime" in entry:
        return
    step = entry["step"]
    told = {name: value for name, value in entry.items() if name != "step" and name not in SUMMARY}
    evaluated = {name.removeprefix("eval_"): value for name, value in told.items() if name.startswith("eval_")}
    trained = {name: value for name, value in told.items() if not name.startswith("eval_")}
    for split, metrics in (("eval", evaluated), ("train", {} if evaluated else trained)):
        if metrics:
            yield {"step": step, "split": split} | {OURS.get(name, name): value for name, value in metrics.items()}


def _tidy(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Numbers only, one line a step and split: what was logged later is added to what was logged before."""
    kept: dict[tuple[float, str], dict[str, Any]] = {}
    for line in lines:
        key = (float(line["step"]), line.get("split", "train"))
        kept.setdefault(key, {"step": key[0], "split": key[1]}).update(
            {name: float(value) for name, value in line.items() if name != "step" and _is_number(value)}
        )
    return [kept[key] for key in sorted(kept)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    title = info.title or name
    axis = info.axis or (f"{name} ({info.unit})" if info.unit else name)
    return info._replace(title=f"{title} (evaluation)" if split == "eval" else title, axis=axis)


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
    total, before, so_far = 0.0, 0.0, {}
    for step, seconds in values_of(lines, "perf/step_seconds").items():
        # A log that is not of every step stands for the steps since its last line.
        total += seconds * (step - before)
        so_far[step] = total
        before = step
    return so_far


def training_metrics(done: Done | None, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Steps and seconds of done.json; tokens/s and largest peak memory of the training lines of metrics.jsonl.

    Tokens/s are all tokens over all seconds of steps, rollouts included: where several steps share a rollout, the
    speed of a typical step says nothing of it.
    """
    peaks = list(values_of(lines, "perf/peak_memory_gib").values())
    tokens, seconds = list(values_of(lines, "num_tokens").values()), list(step_seconds(lines).values())
    found = {} if done is None else {"steps": float(done.step), "seconds": done.seconds}
    if tokens and seconds and seconds[-1]:
        found["tokens_per_second"] = tokens[-1] / seconds[-1]
    return found | ({"peak_memory_gib": max(peaks)} if peaks else {})
