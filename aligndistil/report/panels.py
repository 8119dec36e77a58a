"""What the metrics are called on a picture, and which of them mean something only on the policy's own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Line = Mapping[str, Any]
"""One line of a metrics.jsonl."""

SAMPLED = "Reward of the policy's samples"


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


PANELS = (
    Panel("reward/token_mean", SAMPLED, "token-averaged reward (nats a token)", on_samples=True, rises=True),
    Panel("kl/policy_teacher", "KL to the teacher", "KL (nats a response)"),
    Panel("rewards/margins", "Reward margin of the pairs", "chosen minus rejected reward (nats)", rises=True),
    Panel("rewards/accuracies", "Reward accuracy", "pairs ranked right", percent=True, rises=True),
    Panel("gold_reward", "Gold reward", "gold reward of samples", rises=True),
)
"""Those of convergence.png."""

OTHERS = (
    Panel("reward/sequence", SAMPLED, "reward (nats a response)", on_samples=True, rises=True),
    Panel("reward/sequence_square", SAMPLED, "squared reward (nats² a response)", on_samples=True),
    Panel(
        "returns/token_mean", "Return-to-go of the policy's samples", "token-averaged return (nats)", on_samples=True
    ),
    Panel("reward/expected", "Expected reward", "reward (nats a response)", rises=True),
    Panel("kl/policy_teacher_token", "KL to the teacher", "KL (nats a token)"),
    Panel("kl/policy_target", "KL to the extrapolated target", "KL (nats a response)"),
    Panel("rewards/chosen", "Reward of the chosen responses", "reward (nats a response)"),
    Panel("rewards/rejected", "Reward of the rejected responses", "reward (nats a response)"),
    Panel("reward_accuracy", "Reward accuracy", "pairs ranked right", percent=True, rises=True),
    Panel("loss", "Loss", "loss"),
    Panel("grad_norm", "Norm of the gradient", "L2 norm, before clipping"),
    Panel("completions/mean_length", "Length of the policy's samples", "mean length (tokens)"),
    Panel("completions/truncated_fraction", "Truncated samples", "samples without an end", percent=True),
    Panel("perf/tokens_per_second", "Throughput", "tokens a second"),
    Panel("perf/peak_memory_gib", "Peak memory of a process", "GiB"),
)
KNOWN = {panel.metric: panel for panel in (*PANELS, *OTHERS)}
EVAL = "eval/"


def split_and_name(metric: str) -> tuple[str, str]:
    """`eval/loss` is ("eval", "loss"); without a prefix, and with `train/`, it is what training logged."""
    return ("eval", metric.removeprefix(EVAL)) if metric.startswith(EVAL) else ("train", metric.removeprefix("train/"))


def panel_of(metric: str) -> Panel:
    """How to draw any metric, `eval/...` included; one that is not known is drawn under its own name."""
    split, name = split_and_name(metric)
    panel = KNOWN.get(name, Panel(name, name, name))
    return panel._replace(metric=metric, title=f"{panel.title} (evaluation)") if split == "eval" else panel


def sampled(line: Line) -> bool:
    """Whether the objective's terms are of the policy's own samples; those of an evaluation are of the eval data's."""
    return line["split"] == "train" and any(name.startswith("completions/") for name in line)


def off_policy(lines: Sequence[Line]) -> bool:
    """Whether rewards and divergences are of given responses: another quantity than of the policy's own."""
    return any("reward/token_mean" in line for line in lines) and not any(sampled(line) for line in lines)
