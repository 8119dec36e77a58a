"""Draw docs/results/objectives/NAME.png, what a normal curve of each objective looks like, from a comparison run.

    aligndistil compare comparison --seeds 3
    python scripts/objective_curves.py runs/comparison docs/results/objectives

Each figure has the metrics that the objective's page speaks of, over the optimizer steps: the mean over the seeds with
a band of one standard error, as a moving average where every step is logged, and evaluations with marks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.report import curves_of, read_methods, save_figure
from aligndistil.report.curves import Curve, smoothed
from aligndistil.report.figures import curve_panel, draw

PAIRS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
ACTOR_CRITIC = ("gold_reward", "kl/policy_reference", "loss/value", "completions/mean_length")
TEACHER = ("reward/token_mean", "gold_reward", "kl/policy_teacher", "completions/mean_length")
SHOWN = {
    "sft": ("sft", ("loss", "logps/token_mean")),
    "dpo": ("dpo", PAIRS),
    "simpo": ("simpo", PAIRS),
    "tdpo": ("tdpo2", (*PAIRS[:3], "kl/margin")),
    "kto": ("kto", ("loss", "rewards/desirable", "rewards/undesirable", "kl/mismatched")),
    "reward_model": ("reward_model", ("loss", "rewards/accuracies", "rewards/margins", "scores/mean")),
    "ppo": ("ppo", ("objective/scores", *ACTOR_CRITIC)),
    "rto": ("rto", ("objective/rewards_teacher", *ACTOR_CRITIC)),
    "aligndistil": ("aligndistil_on", TEACHER),
    "reinforce": ("reinforce", TEACHER),
    "bandit": ("bandit", TEACHER),
}
"""Of each page: the stage of the comparison, and its metrics."""


def main(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for page, (stage, metrics) in SHOWN.items():
        panels = []
        for metric in metrics:
            curves = found(run / stage, metric)
            panels.append(curve_panel(curves, smoothed(curves), metric, "step"))
        save_figure(draw(panels, ["training", "evaluation"]), folder / f"{page}.png")
        print(folder / f"{page}.png")


def found(stage: Path, metric: str) -> list[Curve]:
    """What training and evaluations logged of a metric: one or both."""
    curves = []
    for label, name in (("training", metric), ("evaluation", f"eval/{metric}")):
        try:
            (curve,) = curves_of(read_methods([stage]), name).curves
        except UserError:
            continue
        curves.append(replace(curve, label=label))
    return curves


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
