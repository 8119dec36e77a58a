"""Write docs/metrics.md from what the loop, the objectives and the evaluation declare of their metrics.

python scripts/metrics_page.py            # `make metrics`
python scripts/metrics_page.py --check    # fails where the page is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from aligndistil.benchmarks import BENCHMARKS
from aligndistil.benchmarks.evaluate import COMMON_METRICS
from aligndistil.benchmarks.human_agreement import METRICS as OF_JUDGES
from aligndistil.benchmarks.reward_bench import RewardBench2
from aligndistil.evaluation.metrics import MODEL_METRICS, REPORT_METRICS
from aligndistil.objectives import registry
from aligndistil.objectives.base import MetricInfo, Role
from aligndistil.objectives.loop_metrics import (
    CRITIC_METRICS,
    EVALUATION_METRICS,
    GOLD_REWARD,
    LOOP_METRICS,
    ROLLOUT_METRICS,
)

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """\
# Metrics: name, unit, definition

One name for one thing. In `metrics.jsonl` a line is one step of one `split` (`train` or `eval`);
in trackers the split stands in front of the name (`train/loss`). Every value is a sum divided by a
count, both taken over all processes and micro-batches of the step and divided once, so no value
depends on how a batch was cut; `.../max` metrics are maxima over the same. A metric with nothing to
count is absent, never 0. A value that is not finite is left out, and its name listed under
`not_finite`.

A **response** is the answer's tokens up to and with EOS (a truncated one has no EOS); `y_t` is a
response token, `s_t` everything before it, `|y|` the number of response tokens, `log` natural, so
log-probabilities, rewards and divergences are in nats. Sums and divergences are float32 over the
full vocabulary. "Mean over responses" weighs each response the same, "mean over tokens" each token.
The responses are those of the data off-policy, and the policy's own samples of that step on-policy.
Where several steps share a rollout, what was measured of the rollout (`completions/...`,
`objective/...`, `returns/...`, `advantages/...`, `kl/policy_reference`) stands on the line of its
first step.

This page is written by `make metrics` from what the code declares.

| name | unit | definition | where |
|---|---|---|---|
"""
TAIL = """
The table at the end of a run and `report/comparison.tex` show a choice of these, or those of
`report.columns`; `comparison.csv` and `comparison.json` hold all that were measured, in full
precision. [comparison.md](comparison.md) says how seeds and runs are put together. In
`convergence.png` light lines are the values of each step, heavy ones their centred moving average
over a twelfth of the curve; a line with marks is of evaluations. The reward panel is drawn for
stages that sample their responses. In reports, `rewards/accuracies` is of all held-out pairs.
"""


def page() -> str:
    """The whole text. Raises ValueError when two objectives mean different things by one name."""
    critics = ", ".join(name for name, cls in registry().items() if Role.CRITIC in cls.example().needs)
    parts = [(LOOP_METRICS, "every stage"), *_of_objectives(), (CRITIC_METRICS, critics)]
    parts += [(ROLLOUT_METRICS, "on-policy, evaluation"), (GOLD_REWARD, "on-policy, evaluation")]
    parts += [(EVALUATION_METRICS, "evaluation")]
    parts += [(MODEL_METRICS, "evaluation"), (REPORT_METRICS, "report")]
    judged = {name: {**cls.metrics, **COMMON_METRICS} for name, cls in BENCHMARKS.items()}
    judged |= {RewardBench2.name: RewardBench2.metrics, "human_agreement": OF_JUDGES | COMMON_METRICS}
    parts += [(_of_benchmark(name, metrics), "`aligndistil evaluate`") for name, metrics in judged.items()]
    rows = [_row(name, info, where) for metrics, where in parts for name, info in metrics.items()]
    return HEAD + "".join(rows) + TAIL


def _of_benchmark(name: str, metrics: Mapping[str, MetricInfo]) -> dict[str, MetricInfo]:
    return {f"{name}/{metric}": info for metric, info in metrics.items()}


def _of_objectives() -> list[tuple[Mapping[str, MetricInfo], str]]:
    """Each metric of an objective once, with the names of all that have it."""
    infos: dict[str, MetricInfo] = {}
    owners: dict[str, list[str]] = {}
    for objective, cls in registry().items():
        for name, info in cls.metrics.items():
            if infos.setdefault(name, info) != info:
                raise ValueError(f"{objective} means something else by {name!r} than {owners[name][0]}")
            owners.setdefault(name, []).append(objective)
    return [({name: info}, ", ".join(owners[name])) for name, info in infos.items()]


def _row(name: str, info: MetricInfo, where: str) -> str:
    return f"| `{name}` | {info.unit} | {info.definition.replace('|', chr(92) + '|')} | {where} |\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else f"{PAGE} is out of date: run `make metrics`")
    PAGE.write_text(page(), encoding="utf-8")
