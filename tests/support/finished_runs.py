"""Finished runs without their training: ours, and TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligndistil.files import write_text
from aligndistil.report import (
    ComparedWith,
    Comparison,
    Measured,
    ModelResult,
    combine,
    read_runs,
    save_results,
    training_metrics,
)
from aligndistil.run_folder import Done, RunFolder

STEPS = 40


def finished_run(path: Path, *, seed: int = 0, gold: float = 0.5, rises: float = 0.01, **settings: Any) -> Path:
    """A run of two stages, one of which samples and whose reward rises by `rises` a step."""
    settings = {
        "beta": 0.1,
        "measured_on": "abc",
        "rewards": [],
        "columns": None,
        "kl_to": "dpo",
        "score": 1.0,
        **settings,
    }
    run = RunFolder(path)
    for name in ("dpo", "policy"):
        resolved = {"objective": {"name": "dpo", "beta": settings["beta"]}, "train": {"seed": seed}, "logging": {}}
        run.stage(name).write_done(
            Done(
                fingerprint="f",
                weights=f"{name} {seed}",
                step=STEPS,
                seconds=10.0 + seed,
                metrics={},
                resolved=resolved,
            )
        )
    for step in range(1, STEPS + 1):
        perf = {"num_tokens": 50.0 * step, "perf/step_seconds": 0.5, "perf/peak_memory_gib": 1.0 + step / STEPS}
        sampled = {"reward/token_mean": rises * step, "completions/mean_length": 20.0 + seed}
        run.stage("dpo").metrics.log(step, "train", {"loss": 1.0, **perf})
        run.stage("policy").metrics.log(step, "train", {"loss": 1.0, **perf, **sampled})
    rows = [ModelResult(name="initial", objective="", metrics={"gold_reward": 0.0, "kl": 1.0, "kl_initial": 0.0})]
    for name, reward in (("dpo", gold / 2), ("policy", gold)):
        folder = run.stage(name)
        measured = {"gold_reward": reward, "kl": 2.0, "kl_initial": 1.0, "completions/mean_length": 30.0}
        metrics = measured | training_metrics(folder.read_done(), folder.metrics.read())
        rows.append(ModelResult(name=name, objective="dpo", metrics=metrics))
    own = ("measured_on", "rewards", "columns", "threshold_metric", "threshold_value")
    told = {key: settings[key] for key in own if key in settings}
    told["kl_to"] = ComparedWith(name=settings["kl_to"])
    told["weights"] = settings.get("weights", {name: f"{name} {seed}" for name in ("dpo", "policy")})
    if "reward" in settings:
        rows = [row.model_copy(update={"metrics": row.metrics | {"reward_score": settings["score"]}}) for row in rows]
        told["reward"] = ComparedWith(name=settings["reward"])
    for row in rows:  # what was measured of it, prompt by prompt
        gold = row.metrics["gold_reward"]
        write_text(
            run.report / "models" / f"{row.name}.json",
            Measured(
                key="", metrics={"gold_reward": gold}, values={"gold_reward": [gold - 0.1, gold + 0.1]}, pairs={}
            ).model_dump_json(),
        )
    compared = Comparison(results=rows, **told)
    save_results(run.report / "comparison.json", compared)
    return path


def trl_run(path: Path) -> Path:
    history: list[dict[str, Any]] = [
        {"step": 10, "loss": 0.69, "rewards/accuracies": 0.5, "num_tokens": 900.0},
        {"step": 10, "eval_loss": 0.66, "eval_rewards/accuracies": 0.55},
        {"step": 20, "loss": 0.61, "rewards/accuracies": 0.8, "rewards/margins": 0.3, "num_tokens": 1900.0},
        {"step": 20, "eval_loss": 0.63, "eval_rewards/accuracies": 0.65, "eval_runtime": 3.0},
        {"step": 20, "train_runtime": 12.5, "train_loss": 0.65, "total_flos": 0.0},
    ]
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 20}))
    return path


def table(*paths: Path) -> dict[str, ModelResult]:
    return {row.name: row for row in combine(read_runs(paths))[0].results}
