"""Draw docs/results/smollm2-comparison.png from the figures that are stored beside it.

    python scripts/smollm2_frontier.py

The models took hours to train; their table is docs/results/smollm2-comparison.csv.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from aligndistil.report import ComparedWith, Comparison, ModelResult, pictures, save_figure

FOLDER = Path(__file__).parents[1] / "docs" / "results"
METHODS = {
    "sft": ("SFT", ""),
    "dpo": ("DPO", ""),
    "reverse_dpo": ("reverse DPO", ""),
    "tdpo1": ("TDPO1", ""),
    "tdpo2": ("TDPO2", ""),
    "kto": ("KTO", ""),
    "simpo": ("SimPO", ""),
    "ppo": ("PPO", ""),
    "rto": ("RTO", ""),
    "bandit": ("bandit", ""),
    "reinforce": ("REINFORCE", ""),
    "aligndistil_static": ("AlignDistil constant weight", ""),
    "aligndistil_off_r5": ("AlignDistil off-policy", "r 5"),
    "aligndistil_off": ("AlignDistil off-policy", "r 15"),
    "aligndistil": ("AlignDistil on-policy", "r 15"),
}
SHOWN = ("kl_initial", "completions/mean_length", "reward_score", "rewards/accuracies")


def main() -> None:
    table = pd.read_csv(FOLDER / "smollm2-comparison.csv").set_index("name")
    rows = []
    for name in (*METHODS, "initial"):
        method, setting = METHODS.get(name, (name, ""))
        metrics = {metric: float(table.loc[name, metric]) for metric in SHOWN if pd.notna(table.loc[name, metric])}
        rows.append(ModelResult(name=name, objective="", method=method, setting=setting, metrics=metrics))
    comparison = Comparison(results=rows, reward=ComparedWith(name="the reward model"))
    save_figure(pictures(comparison, {})["frontier.png"], FOLDER / "smollm2-comparison.png")


if __name__ == "__main__":
    main()
