"""Terms and metrics that several objectives have: what they are, and how they are computed."""

from __future__ import annotations

from torch import Tensor

from aligndistil.maths import Metric, mean_of, mean_tokens, sum_tokens
from aligndistil.objectives.types import MetricInfo, Need, Role, TermInfo, TokenChunk

SAMPLES_REWARD = "Reward of the policy's samples"

PREFERENCE_METRICS = {
    "rewards/chosen": MetricInfo(
        "nats",
        "mean over chosen responses of the implicit reward: `beta (log pi(y|x) - log pi_ref(y|x))`, log-probabilities "
        "summed over tokens (dpo, tdpo); `beta log pi(y|x) / |y|` (simpo); of a scalar head, the score of the text up "
        "to the last token (reward_model). Going down is normal: the margin is what is trained",
        title="Reward of the chosen responses",
        axis="reward (nats per response)",
    ),
    "rewards/rejected": MetricInfo(
        "nats",
        "the same over rejected responses",
        title="Reward of the rejected responses",
        axis="reward (nats per response)",
    ),
    "rewards/margins": MetricInfo(
        "nats",
        "mean over pairs of chosen minus rejected reward",
        title="Reward margin of the pairs",
        axis="chosen minus rejected reward (nats)",
        better="more",
    ),
    "rewards/accuracies": MetricInfo(
        "share",
        "pairs whose chosen reward is larger than the rejected one, a tie counting as half: of a trained model, the "
        "reward that it stands for itself (its own reference's, SimPO's per token, a scalar head's score)",
        title="Reward accuracy",
        axis="pairs ranked right",
        better="more",
    ),
}
"""Of every loss on the rewards of a pair."""

LOGP_METRICS = {
    "logps/chosen": MetricInfo("nats", "mean over chosen responses of `log pi(y|x)`, summed over tokens"),
    "logps/rejected": MetricInfo("nats", "the same over rejected responses"),
    "logps/chosen_token_mean": MetricInfo("nats per token", "mean over chosen responses of `log pi(y|x) / |y|`"),
    "logps/rejected_token_mean": MetricInfo("nats per token", "the same over rejected responses"),
}
"""Of every loss on the log-probabilities of a pair."""

TEACHER_METRICS = {
    "reward/token_mean": MetricInfo(
        "nats per token",
        "mean over responses of `1/|y| sum_t r(y_t)` with `r = beta0 (log pi_teacher - log pi_other)`; other = the "
        "reverse teacher (contrastive) or the reference (vanilla). On-policy it is the curve of the paper's Figure 2; "
        "off-policy it does not depend on the policy",
        title=SAMPLES_REWARD,
        axis="token-averaged reward (nats per token)",
        better="more",
        on_samples=True,
    ),
    "reward/sequence": MetricInfo(
        "nats",
        "mean over responses of `sum_t r(y_t)`",
        title=SAMPLES_REWARD,
        axis="reward (nats per response)",
        better="more",
        on_samples=True,
    ),
    "kl/policy_teacher": MetricInfo(
        "nats",
        "mean over responses of `sum_t KL(pi(.|s_t) || pi_teacher(.|s_t))`",
        title="KL to the teacher",
        axis="KL (nats per response)",
    ),
    "kl/policy_teacher_token": MetricInfo(
        "nats per token",
        "mean over responses of the same sum divided by `|y|`",
        title="KL to the teacher",
        axis="KL (nats per token)",
    ),
}
"""Of every loss on a teacher's token reward."""

SAMPLED_RETURN_METRICS = {
    "reward/sequence_square": MetricInfo(
        "nats²",
        "mean over responses of the square of that sum; `sqrt(reward/sequence_square - reward/sequence²)` is the "
        "spread of the return of whole responses",
        title=SAMPLES_REWARD,
        axis="squared reward (nats² per response)",
        on_samples=True,
    ),
    "kl/policy_teacher_sampled": MetricInfo(
        "nats",
        "mean over responses of `log pi(y|x) - log pi_teacher(y|x)`: on samples of the policy the estimate of "
        "`kl/policy_teacher` from their tokens alone, and the penalty of the bandit's reward",
    ),
}
"""Of the two policy gradients (REINFORCE, bandit) on that reward."""

LOGP = TermInfo("log p", "log-probability of the token under the policy")
REF_LOGP = TermInfo("log p reference", "log-probability of the token under the reference")
TEACHER_LOGP = TermInfo("log p teacher", "log-probability of the token under the teacher")
TOKEN_REWARD = TermInfo("reward", "the token's reward, from the log-ratio of the two frozen models")
KL_TEACHER = TermInfo("KL to teacher", "KL(policy || teacher) over the whole vocabulary")


SAMPLED_REWARD_TERMS = {
    "reward": TOKEN_REWARD,
    "kl_teacher": KL_TEACHER,
    "logp": LOGP,
    "teacher_logp": TEACHER_LOGP,
}
SAMPLED_REWARD_NEEDS: dict[str, Need] = {
    Role.POLICY: Need.DISTRIBUTION,
    Role.TEACHER: Need.DISTRIBUTION,
    Role.REVERSE_TEACHER: Need.LOGP,
}
"""Of the two policy gradients; the distributions are for the exact KL to the teacher."""


def preference_metrics(*, reward_B: Tensor, logp_BT: Tensor, response_BT: Tensor) -> dict[str, Metric]:
    """What every loss on pairs logs: rewards and log-probabilities of both sides. Rows are interleaved."""
    margin = (reward_B[0::2] - reward_B[1::2]).detach()
    logp_B, per_token_B = sum_tokens(logp_BT, response_BT), mean_tokens(logp_BT, response_BT)
    return {
        "rewards/chosen": mean_of(reward_B[0::2]),
        "rewards/rejected": mean_of(reward_B[1::2]),
        "rewards/margins": mean_of(margin),
        "rewards/accuracies": mean_of(ranked_right(margin)),
        "logps/chosen": mean_of(logp_B[0::2]),
        "logps/rejected": mean_of(logp_B[1::2]),
        "logps/chosen_token_mean": mean_of(per_token_B[0::2]),
        "logps/rejected_token_mean": mean_of(per_token_B[1::2]),
    }


def ranked_right(margin_B: Tensor) -> Tensor:
    """(B,) 1 where the chosen response has the larger reward, 0 where the rejected one has, and half for a tie.

    A policy that is still its own reference ranks nothing, and is right as often as a coin.
    """
    return (1 + margin_B.sign()) / 2


def teacher_metrics(*, reward_BT: Tensor, kl_teacher_BT: Tensor, response_BT: Tensor) -> dict[str, Metric]:
    """What every loss on a teacher's token reward logs, so that their curves can be laid over each other."""
    return {
        "reward/token_mean": mean_of(mean_tokens(reward_BT, response_BT)),
        "reward/sequence": mean_of(sum_tokens(reward_BT, response_BT)),
        "kl/policy_teacher": mean_of(sum_tokens(kl_teacher_BT, response_BT)),
        "kl/policy_teacher_token": mean_of(mean_tokens(kl_teacher_BT, response_BT)),
    }


def sampled_reward_terms(chunk: TokenChunk, beta0: float) -> dict[str, Tensor]:
    """(n,) log-probabilities of policy and teacher, and the contrastive reward of each token that was sampled."""
    logp, teacher_logp = chunk.logp[Role.POLICY], chunk.logp[Role.TEACHER]
    reward = beta0 * (teacher_logp - chunk.logp[Role.REVERSE_TEACHER])
    return {"logp": logp, "teacher_logp": teacher_logp, "reward": reward}
