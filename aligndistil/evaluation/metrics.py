"""What is measured of whole models: the names of a report's columns, their units and definitions."""

from __future__ import annotations

from aligndistil.objectives.base import MetricInfo

MODEL_METRICS = {
    "reward_score": MetricInfo(
        "",
        "mean score that a reward model (`report.reward`) gives the sampled responses, at their last token; its scale "
        "is that of the reward model, so another seed's is another",
    ),
    "kl": MetricInfo(
        "nats",
        "mean over the model's own samples for held-out prompts of `sum_t KL(pi(.|s_t) || pi_to(.|s_t))`; the report "
        "names `pi_to` (`report.kl_to`). Unlike `kl/policy_teacher` it is always on the model's own samples",
    ),
    "kl_data": MetricInfo("nats", "`kl` on chosen responses of the eval data instead of the model's own samples"),
    "kl_initial_data": MetricInfo("nats", "`kl_initial` on those responses"),
    "length_characters": MetricInfo(
        "characters", "mean length of the sampled responses as text, as AlpacaEval reports it"
    ),
    "distinct_1": MetricInfo(
        "share", "different tokens by all tokens of the sampled responses of all prompts together, EOS included"
    ),
    "distinct_2": MetricInfo(
        "share",
        "different pairs of neighbouring tokens by all such pairs of the sampled responses; low when they repeat each "
        "other",
    ),
}
"""Of the models of a report, measured on the same held-out prompts and pairs; beside what training logs of the same
name: `gold_reward`, `kl_initial`, `rewards/accuracies`, `completions/mean_length`, `completions/truncated_fraction`."""

REPORT_METRICS = {
    "steps_to_reward": MetricInfo(
        "steps",
        "first step at which the moving average (over a twelfth of the curve of middle length) of "
        "`report.threshold_metric` reaches `report.threshold`; the report says which, and how a threshold of its own "
        "was chosen. Absent where it does not, or not with every seed, or where the curve begins there",
    ),
    "steps": MetricInfo("steps", "optimizer steps of the stage that made the model"),
    "seconds": MetricInfo("s", "wall time of that stage, of all its attempts"),
    "compute_seconds": MetricInfo(
        "s",
        "wall time of the optimizer steps of that stage, rollouts included and evaluations not, and of the stages that "
        "it needs: teachers, a reward model, what it starts from",
    ),
    "tokens_per_second": MetricInfo(
        "tokens/s",
        "prompt and response tokens of all steps of that stage, by their wall time, rollouts included and evaluations "
        "not",
    ),
    "peak_memory_gib": MetricInfo("GiB", "maximum of `perf/peak_memory_gib` over the logged steps of that stage"),
}
"""Of the stage that made a model, in a report."""
