"""The protocol of an objective: what it declares, what it computes, what it returns.

An objective is one file with one frozen Pydantic class. Its fields are its hyperparameters, its class variables and
`needs` say what it must be given, and two pure methods are its mathematics: `token_terms`, the only place that sees the
vocabulary, and `loss`, which sees per-token scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.types import (
    FIRST_STEP_NATS,
    Expected,
    ImplicitReward,
    Loss,
    MetricInfo,
    Need,
    OnPolicy,
    Prepared,
    Prepares,
    Role,
    Sampled,
    State,
    TermInfo,
    TokenChunk,
    scalar_term,
)

__all__ = [
    "FIRST_STEP_NATS",
    "Expected",
    "ImplicitReward",
    "Loss",
    "MetricInfo",
    "Need",
    "Objective",
    "OnPolicy",
    "Prepared",
    "Prepares",
    "Role",
    "Sampled",
    "State",
    "TermInfo",
    "TokenChunk",
    "scalar_term",
]


class Objective(BaseModel):
    """Base of all objectives. Subclasses add `name: Literal[...]` and their hyperparameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: ClassVar[DataKind]
    """What an example of its batches is. On-policy, a rollout turns PROMPTS into RESPONSES."""
    on_policy: ClassVar[OnPolicy] = OnPolicy.NEVER
    sampled: ClassVar[Sampled] = Sampled.ITSELF
    """What a rollout's samples are to it, which says what they may be drawn with."""
    prepares: ClassVar[Prepares] = Prepares.NOTHING
    groups: ClassVar[bool] = False
    """Whether `prepare` compares the samples of one prompt with each other: it is then given whole groups (see
    `Batch.group_B`), and `rollout.samples_per_prompt` must be 2 or more."""
    reads_last_score: ClassVar[bool] = False
    """Whether of a reward model's scores it reads that of the whole response alone, so that the model need not have the
    policy's tokens: one with others is told the conversation as text."""
    implicit_reward: ClassVar[ImplicitReward] = ImplicitReward.NONE
    """The reward that the trained policy stands for."""
    teacher_beta: ClassVar[str] = ""
    """The field that holds the beta its teachers were trained with, where it takes their log-ratios for rewards."""
    roles: ClassVar[Mapping[str, str]] = {}
    """Roles of its own, beside those of `Role`: a name, and what that model is."""
    terms: ClassVar[Mapping[str, TermInfo]] = {}
    """What `token_terms` and `preparation_terms` return, for the page that shows tokens."""
    metrics: ClassVar[Mapping[str, MetricInfo]] = {}
    """Everything that `loss` and `prepare` measure."""
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """The metrics to watch while it trains, the most telling one first."""
    paper: ClassVar[str]
    """Where the objective comes from."""
    title: ClassVar[str] = ""
    """What papers call the method; empty is the objective's name. See `method`."""

    name: str

    @property
    def needs(self) -> dict[str, Need]:
        """The roles this objective reads, with these hyperparameters."""
        raise NotImplementedError

    @property
    def update_needs(self) -> dict[str, Need]:
        """The roles that `loss` reads; `prepare` reads all of `needs`."""
        return self.needs

    @property
    def is_scalar(self) -> bool:
        """Whether what is trained is a scalar head, so that the stage ends with no language model."""
        return self.needs[Role.POLICY].is_scalar

    def trained_at(self, temperature: float) -> float:
        """The temperature of the policy that is trained, and of all distributions, on samples drawn at this one."""
        return temperature if self.sampled is Sampled.TEMPERED else 1.0

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
        """Look at what `prepares` names before the first gradient of the step: all rows of a rollout, or a micro-batch
        of mismatched ones."""
        raise NotImplementedError

    def initial_state(self) -> dict[str, float]:
        """The numbers that `prepare` is given at the first step."""
        return {}

    def next_state(self, state: State, means: Mapping[str, float], examples: int) -> dict[str, float]:
        """Those of the next step, from the means of what `prepare` measured on this step's `examples`."""
        return dict(state)

    def first_step(self) -> list[Expected]:
        """What must hold at step 0 when policy and reference are the same model."""
        return []

    @property
    def method(self) -> str:
        """What tables and pictures call it, with these hyperparameters."""
        return self.title or str(getattr(self, "name", type(self).__name__))

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
            "metrics": {name: info.definition for name, info in cls.metrics.items()},
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
