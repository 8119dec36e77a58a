"""The protocol of an objective: what it declares, what it computes, what it returns.

An objective is one file with one frozen Pydantic class. Its fields are its hyperparameters, its class variables and
`needs` say what it must be given, and two pure methods are its mathematics: `token_terms`, the only place that sees the
vocabulary, and `loss`, which sees per-token scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.maths import Metric


class Role(StrEnum):
    """A model that takes part in a step. POLICY and CRITIC are trained; the others are frozen."""

    POLICY = "policy"
    REFERENCE = "reference"
    TEACHER = "teacher"
    REVERSE_TEACHER = "reverse_teacher"
    REWARD = "reward"
    """Scores whole responses; frozen."""
    CRITIC = "critic"
    """Predicts returns; trained beside the policy, from the model that the recipe names."""


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


class Prepares(StrEnum):
    """On what `Objective.prepare` runs, before the gradient of a step."""

    NOTHING = "nothing"
    MISMATCHED = "mismatched"
    """Each prompt of the step with the response of the next example that has another prompt."""
    ROLLOUT = "rollout"
    """The step's own samples, which several optimizer steps may then share."""


def scalar_term(role: Role, need: Need) -> str:
    """The name under which `loss` and `prepare` find a scalar head's (B, T) output: `reward_score`, `critic_value`."""
    return f"{role}_{'value' if need is Need.VALUE else 'score'}"


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """n response tokens, as `Objective.token_terms` sees them. Everything is a float32 log-probability (or wider)."""

    ids: Tensor
    """(n,) the tokens themselves."""
    logp: Mapping[Role, Tensor]
    """(n,) log-probability of the token, for every role that is needed."""
    logps: Mapping[Role, Tensor]
    """(n, V) log-probabilities, for roles needed as a DISTRIBUTION."""


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


class Expected(NamedTuple):
    """A metric whose value at step 0 is known, when the policy starts as the reference."""

    metric: str
    value: float
    tolerance: float
    why: str


class Objective(BaseModel):
    """Base of all objectives. Subclasses add `name: Literal[...]` and their hyperparameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: ClassVar[DataKind]
    """What an example of its batches is. On-policy, a rollout turns PROMPTS into RESPONSES."""
    on_policy: ClassVar[OnPolicy] = OnPolicy.NEVER
    prepares: ClassVar[Prepares] = Prepares.NOTHING
    paper: ClassVar[str]
    """Where the objective comes from."""

    name: str

    @property
    def needs(self) -> dict[Role, Need]:
        """The roles this objective reads, with these hyperparameters."""
        raise NotImplementedError

    @property
    def update_needs(self) -> dict[Role, Need]:
        """The roles that `loss` reads; `prepare` reads all of `needs`."""
        return self.needs

    @property
    def is_scalar(self) -> bool:
        """Whether what is trained is a scalar head, so that the stage ends with no language model."""
        return self.needs[Role.POLICY].is_scalar

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        """Named per-token scalars (n,), differentiable in the policy's log-probabilities."""
        raise NotImplementedError

    def target_logps(self, chunk: TokenChunk) -> Tensor | None:
        """(n, V) log-probabilities of the distribution that the policy is pulled towards; None where there is none."""
        return None

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        """Per-example losses from terms of shape (B, T), which are zero where there is no response token.

        `terms` are those of `token_terms`, the outputs of scalar heads (`scalar_term`), and what `prepare` found.
        """
        raise NotImplementedError

    def preparation_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        """What `prepare` is given of each token; as `token_terms`, without gradient."""
        return self.token_terms(chunk)

    def prepare(self, batch: Batch, terms: Mapping[str, Tensor], state: State) -> Prepared:
        """Look at a micro-batch of what `prepares` names, before the first gradient of the step."""
        raise NotImplementedError

    def initial_state(self) -> dict[str, float]:
        """The numbers that `prepare` is given at the first step."""
        return {}

    def next_state(self, state: State, means: Mapping[str, float], examples: int) -> dict[str, float]:
        """Those of the next step, from the means of what `prepare` measured on this step's `examples`."""
        return dict(state)

    def term_gradient(self, batch: Batch) -> dict[str, Tensor] | None:
        """The derivative (B, T) of the summed losses in each term, up to one factor common to the whole batch.

        Given where it is known before the forward pass: then the engine computes the gradient of the head during that
        pass, and no token is projected twice. None where it is not known, as in DPO with more than one pair.
        """
        return None

    def first_step(self) -> list[Expected]:
        """What must hold at step 0 when policy and reference are the same model."""
        return []

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name, paper, data, roles and fields, for `aligndistil objectives`."""
        example = cls.example()
        return {
            "name": example.name,
            "summary": (cls.__doc__ or "").strip().splitlines()[0],
            "paper": cls.paper,
            "data": str(cls.data),
            "on_policy": str(cls.on_policy),
            "prepares": str(cls.prepares),
            "models": {str(role): str(need) for role, need in example.needs.items()},
            "fields": {
                key: {"default": info.default, "description": info.description or ""}
                for key, info in cls.model_fields.items()
                if key != "name"
            },
        }

    @classmethod
    def example(cls) -> Objective:
        """An instance with default hyperparameters."""
        return cls.model_validate({})
