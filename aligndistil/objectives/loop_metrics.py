"""What is measured of every stage, whatever its objective: by the loop, by rollouts and by evaluations."""

from __future__ import annotations

from aligndistil.objectives.types import MetricInfo

LOOP_METRICS = {
    "step": MetricInfo("steps", "optimizer steps taken so far; a field of each line"),
    "epoch": MetricInfo("epochs", "training examples seen, divided by the examples of the training data"),
    "loss": MetricInfo(
        "nats",
        "what is minimised: mean over examples of the objective's loss (a pair is one example)",
        title="Loss",
        axis="loss",
    ),
    "grad_norm": MetricInfo(
        "", "L2 norm of the whole gradient, before clipping", title="Norm of the gradient", axis="L2 norm"
    ),
    "learning_rate": MetricInfo("", "the rate this step was taken with", title="Learning rate"),
    "num_tokens": MetricInfo("tokens", "prompt and response tokens trained on since the stage began, without padding"),
    "perf/step_seconds": MetricInfo("s", "wall time of the step, rollout included", title="Seconds of a step"),
    "perf/tokens_per_second": MetricInfo(
        "tokens/s",
        "prompt and response tokens of the step, of all processes, by its wall time",
        title="Throughput",
        axis="tokens per second",
    ),
    "perf/real_token_fraction": MetricInfo(
        "share", "tokens of the step's micro-batches that are prompt or response; the rest is padding"
    ),
    "perf/peak_memory_gib": MetricInfo(
        "GiB",
        "the most memory that one process has held: allocated by torch on a GPU, resident on a CPU",
        title="Peak memory of a process",
        axis="GiB",
    ),
    "perf/estimated_memory_gib": MetricInfo(
        "GiB",
        "what the estimate of `--dry-run` says of the peak, for rows as long as the longest so far; on a CPU, "
        "`perf/peak_memory_gib` also holds Python and its libraries",
    ),
}
"""Of every stage."""

CRITIC_METRICS = {
    "critic/learning_rate": MetricInfo("", "as `learning_rate`, of the critic"),
    "critic/grad_norm": MetricInfo("", "as `grad_norm`, of the critic"),
}
"""Of stages with a critic."""

ROLLOUT_METRICS = {
    "completions/mean_length": MetricInfo(
        "tokens",
        "mean length of the sampled responses, EOS included",
        title="Length of the policy's samples",
        axis="mean length (tokens)",
    ),
    "completions/truncated_fraction": MetricInfo(
        "share",
        "sampled responses that reached `max_new_tokens` without EOS",
        title="Truncated samples",
        axis="samples without an end",
    ),
    "rollout/tokens_per_second": MetricInfo(
        "tokens/s", "response tokens sampled in the step, of all processes, by the wall time of sampling"
    ),
    "rollout/logp_diff": MetricInfo(
        "nats per token",
        "mean over the sampled tokens of the distance between the log-probability that generation gave a token and the "
        "one that training gives it, of the first rollout of a stage; above 0.01 in float32 and 0.25 in bfloat16 the "
        "stage stops",
    ),
    "rollout/logp_diff_max": MetricInfo("nats", "the largest of the same (a maximum, like `.../max`)"),
}
"""Of on-policy stages; the first two of evaluations that sample, too."""

GOLD_REWARD = {
    "gold_reward": MetricInfo(
        "-1 to 1",
        "mean exact reward of sampled responses, where the data has one (`builtin:reviews`: mean sentiment of the "
        "opinion words): of the step, of an evaluation, or of a whole model",
        title="Gold reward",
        axis="gold reward of samples",
        better="more",
    )
}

EVALUATION_METRICS = {
    "kl_initial": MetricInfo(
        "nats",
        "mean over the policy's answers of `sum_t KL(pi(.|s_t) || pi_initial(.|s_t))`, exact over the vocabulary; "
        "initial = what training began from, through every stage before this one",
        title="KL to the initial model",
        axis="KL to the initial model (nats per response)",
    )
}
"""Of evaluations with `evaluation.kl_initial`, and of whole models."""
