"""What an objective and its caller say to each other: roles, how much of each model is read, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from torch import Tensor

from aligndistil.maths import Metric


class Role(StrEnum):
    """The roles of the objectives in this package. POLICY and CRITIC are trained; every other role is frozen.

    A role is a name: an objective may read others, which it describes in `Objective.roles`.
    """

    POLICY = "policy"
    REFERENCE = "reference"
    TEACHER = "teacher"
    REVERSE_TEACHER = "reverse_teacher"
    REWARD = "reward"
    CRITIC = "critic"


ROLES: dict[str, str] = {
    Role.REFERENCE: "What the policy is kept close to.",
    Role.TEACHER: "What the policy learns from.",
    Role.REVERSE_TEACHER: "Trained on reversed preferences; it and the teacher span the token-level reward.",
    Role.REWARD: "What scores responses: a model with a scalar head, or `python:MODULE:FUNCTION`, which needs "
    "`--allow-code`.",
    Role.CRITIC: "What the critic starts from, which is trained beside the policy: a model with a scalar head, or a "
    "language model, which is given a new one.",
}
"""What each of these roles is, for people."""


class Need(StrEnum):
    """How much of a role's output an objective looks at."""

    LOGP = "logp"
    """Only the log-probability of each response token."""
    DISTRIBUTION = "distribution"
    """The log-probabilities of the whole vocabulary at each response token."""
    SCORE = "score"
    """One number for the text up to and including each response token, from a scalar head."""
    NORMALIZED_SCORE = "normalized_score"
    """A score less the mean of the model's scores on its evaluation data, over their standard deviation."""
    VALUE = "value"
    """One number for the text before each response token, from a scalar head."""

    @property
    def is_scalar(self) -> bool:
        """Whether the model has a scalar head instead of a language-model head."""
        return self not in (Need.LOGP, Need.DISTRIBUTION)


class OnPolicy(StrEnum):
    """Whether an objective's responses may, or must, be sampled from the policy during training."""

    NEVER = "never"
    OPTIONAL = "optional"
    ALWAYS = "always"


class Sampled(StrEnum):
    """What a rollout's samples are to an objective: what it may be sampled with, beside temperature 1 and top_p 1."""

    ITSELF = "itself"
    """Draws from the policy, over which its estimator averages: nothing else."""
    TEMPERED = "tempered"
    """Draws from the policy that is trained, which is the one at the rollout's temperature: logits are divided by it
    before every softmax. No top_p: what it cuts off has a probability in the loss."""
    STATES = "states"
    """Texts after which is learnt what would be learnt after any other: any temperature, any top_p."""


class Prepares(StrEnum):
    """On what `Objective.prepare` runs, before the gradient of a step."""

    NOTHING = "nothing"
    MISMATCHED = "mismatched"
    """Each prompt of the step with the response of the next example that has another prompt."""
    ROLLOUT = "rollout"
    """The step's own samples, which several optimizer steps may then share."""


def scalar_term(role: str, need: Need) -> str:
    """The name under which `loss` and `prepare` find a scalar head's (B, T) output: `reward_score`, `critic_value`."""
    return f"{role}_{'value' if need is Need.VALUE else 'score'}"


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """n response tokens, as `Objective.token_terms` sees them. Everything is a float32 log-probability (or wider)."""

    ids: Tensor
    """(n,) the tokens themselves."""
    logp: Mapping[str, Tensor]
    """(n,) log-probability of the token, for every role that is needed."""
    logps: Mapping[str, Tensor]
    """(n, V) log-probabilities, for roles needed as a DISTRIBUTION."""
    own_logp: Mapping[str, Tensor] = field(default_factory=dict)
    """(n,) `logp` of the frozen roles at temperature 1, where the others are at another one (`Sampled.TEMPERED`); else
    empty."""


class MetricInfo(NamedTuple):
    """What a metric is, for tables, pictures and people."""

    unit: str
    """`nats`, `share`, ...; empty for a pure number."""
    definition: str
    """One sentence, in Markdown."""
    title: str = ""
    """On a picture; empty is the metric's own name."""
    axis: str = ""
    """The label of its axis; empty is made of title and unit."""
    better: Literal["more", "less"] | None = None
    """What training is for, so that methods can be compared by how soon they have it."""
    on_samples: bool = False
    """Whether it says something of the policy only on the policy's own samples."""


class TermInfo(NamedTuple):
    """What a per-token term is, for the page that shows tokens."""

    label: str
    meaning: str


class ImplicitReward(StrEnum):
    """What a trained policy says a response is worth, where its objective gives it a reward."""

    NONE = "none"
    LOG_RATIO = "log_ratio"
    """log pi(y|x) - log pi_ref(y|x), as in DPO; a constant factor ranks no pair differently."""
    MEAN_LOGP = "mean_logp"
    """log pi(y|x) / |y|, as in SimPO."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What `Objective.loss` returns: one loss per example, never a mean, and the metrics of the batch."""

    per_example: Tensor
    """(E,)"""
    metrics: dict[str, Metric]
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Metrics that are reduced by their maximum."""
    critic_per_example: Tensor | None = None
    """(E,) what the critic is trained on, where there is one; it shares no gradient with `per_example`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `Objective.prepare` finds out about a micro-batch, without gradient."""

    terms: dict[str, Tensor]
    """(B, T), given to `loss` with the same rows."""
    metrics: dict[str, Metric]
    """Logged; and their means over the whole step are given to `loss` as scalars of the same names."""


State = Mapping[str, float]
"""Numbers that an objective carries from step to step."""


FIRST_STEP_NATS = 0.01
"""How far the log-ratio of a response may be from 0 at step 0, when policy and reference are the same weights."""


class Expected(NamedTuple):
    """A metric whose value at step 0 is known, when the policy starts as the reference."""

    metric: str
    value: float
    tolerance: float
    """In the metric's unit, what FIRST_STEP_NATS make of it; that is for float32, and 20 times as far for bfloat16."""
    why: str
