"""What the metrics are called on a picture, and which of them mean something only on the policy's own samples."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aligndistil.objectives import registry
from aligndistil.objectives.base import MetricInfo
from aligndistil.training.metrics import CRITIC_METRICS, GOLD_REWARD, LOOP_METRICS, ROLLOUT_METRICS

Line = Mapping[str, Any]
"""One line of a metrics.jsonl."""


class Panel(NamedTuple):
    """One set of axes: the same metric of every stage that has it."""

    metric: str
    title: str
    axis: str
    on_samples: bool = False
    """Meaningful only on responses that the policy sampled itself: on given ones it does not depend on the policy."""
    percent: bool = False
    rises: bool = False
    """More of it is what training is for, so that methods can be compared by how soon they have it."""


CONVERGENCE = ("reward/token_mean", "kl/policy_teacher", "rewards/margins", "rewards/accuracies", "gold_reward")
"""Those of convergence.png, in this order."""


@functools.cache
def known_metrics() -> dict[str, MetricInfo]:
    """Every metric that the loop or a registered objective declares."""
    declared = [LOOP_METRICS, CRITIC_METRICS, ROLLOUT_METRICS, GOLD_REWARD]
    declared += [dict(objective.metrics) for objective in registry().values()]
    ranked = {"reward_accuracy": MetricInfo("share", "", "Reward accuracy", "pairs ranked right", "more")}
    return {name: info for metrics in (*declared, ranked) for name, info in metrics.items()}


EVAL = "eval/"


def split_and_name(metric: str) -> tuple[str, str]:
    """`eval/loss` is ("eval", "loss"); without a prefix, and with `train/`, it is what training logged."""
    return ("eval", metric.removeprefix(EVAL)) if metric.startswith(EVAL) else ("train", metric.removeprefix("train/"))


def panel_of(metric: str) -> Panel:
    """How to draw any metric, `eval/...` included; one that is not known is drawn under its own name."""
    split, name = split_and_name(metric)
    info = known_metrics().get(name, MetricInfo("", ""))
    title = info.title or name
    return Panel(
        metric,
        f"{title} (evaluation)" if split == "eval" else title,
        info.axis or (f"{name} ({info.unit})" if info.unit else name),
        on_samples=info.on_samples,
        percent=info.unit == "share",
        rises=info.better == "more",
    )


def sampled(line: Line) -> bool:
    """Whether the objective's terms are of the policy's own samples; those of an evaluation are of the eval data's."""
    return line["split"] == "train" and any(name.startswith("completions/") for name in line)


def off_policy(lines: Sequence[Line]) -> bool:
    """Whether rewards and divergences are of given responses: another quantity than of the policy's own."""
    return any("reward/token_mean" in line for line in lines) and not any(sampled(line) for line in lines)
