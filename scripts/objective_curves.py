"""Draw docs/results/objectives/NAME.png, what a normal curve of each objective looks like, from a comparison run.

    aligndistil compare comparison --seeds 3
    python scripts/objective_curves.py runs/comparison docs/results/objectives

Each figure has the metrics that the objective's page speaks of, over the optimizer steps: the mean over the seeds with
a band of one standard deviation, averaged over four steps on either side where every step is logged, and evaluations as
dots.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aligndistil.errors import UserError
from aligndistil.report import curves_of, read_methods, save_figure
from aligndistil.report.figures import STYLE
from aligndistil.report.palette import looks

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


EVERY_STEP, REACH = 48, 4.0
"""A curve of more points is smoothed over so many steps on either side."""


def main(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for page, (stage, metrics) in SHOWN.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(3.5 * len(metrics), 2.9))
            figure.set_layout_engine("constrained", w_pad=0.1)
            for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
                draw(axes, run / stage, metric)
            save_figure(figure, folder / f"{page}.png")
        print(folder / f"{page}.png")


def draw(axes: Axes, stage: Path, metric: str) -> None:
    methods = read_methods([str(stage)])
    (curve,) = curves_of(methods, metric).curves
    if len(curve.steps) > EVERY_STEP:
        curve = curve.smoothed(REACH)
    colour = looks(1)[0].line
    mean, spread = curve.mean, curve.deviation
    axes.plot(curve.mean_x, mean, color=colour, lw=1.8)
    if curve.seeds > 1:
        axes.fill_between(curve.mean_x, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    try:
        evaluated = curves_of(methods, f"eval/{metric}").curves
    except UserError:  # not every metric is evaluated
        evaluated = []
    for one in evaluated:
        axes.plot(one.mean_x, one.mean, "o", ms=5, color="#D55E00", mec="white", zorder=4)
    axes.set_title(metric, fontsize=10.5)
    axes.set_xlabel("optimizer steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
