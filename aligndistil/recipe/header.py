"""What a recipe says once, for all of its stages: its name, its folder, and what is reported at its end."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from aligndistil.recipe.section import Section, Text, refusal

ReportColumn: TypeAlias = Literal[
    "reward_accuracy",
    "gold_reward",
    "reward_score",
    "kl",
    "kl_data",
    "kl_initial",
    "kl_initial_data",
    "length_mean",
    "length_characters",
    "truncated_fraction",
    "distinct_1",
    "distinct_2",
    "steps_to_reward",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_memory_gib",
]
"""What docs/metrics.md defines of whole models."""


class Report(Section):
    """The table and the picture at the end of a recipe."""

    kl_to: Text | None = None
    """The model that D_KL(policy || .) is measured against; null is the teacher of the last stage that has one, or else
    the initial model."""
    reward: Text | None = None
    """The model with a scalar head that scores the samples; null is the last stage that trains one, or else the reward
    of the last stage that is given one."""
    samples: int = Field(default=256, ge=1)
    """Prompts each model answers, and responses of the data that divergences are measured on."""
    pairs: int | None = Field(default=None, ge=1)
    """Pairs of the eval data that every model ranks; null is all of them."""
    batch_size: int = Field(default=64, ge=1)
    """Rows generated or scored at once."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; null is data.max_response_length of the stage."""
    seed: int = Field(default=0, ge=0)
    """Of the samples: the same for every model, whatever it was trained with."""
    reward_accuracy: bool = False
    """Also lay the rewards that the models stand for beside each other (scores, DPO rewards, contrastive ones): how
    often each ranks eval pairs right, and as many training pairs."""
    threshold: float | None = None
    """The value that `steps_to_reward` counts the steps to; null is 90 % of the way to the lowest final value."""
    threshold_metric: Text | None = None
    """Of the training log, or of its evaluations as `eval/NAME`; null is `reward/token_mean`, or else a gold reward."""
    columns: list[ReportColumn] | None = None
    """What the tables show, in this order; null is the usual choice. The .csv and .json always have everything."""


class Header(Section):
    """What a recipe says once, for all of its stages."""

    schema_version: int = 1
    """The version of this format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Of the run; null is the name of the recipe file. Not inherited through `extends`."""
    output_dir: Text | None = None
    """The run folder, relative to the current folder; null is `runs/NAME`. Not inherited through `extends`."""
    report: Report = Report()
    """The table and the picture at the end."""

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.schema_version != 1:
            raise refusal("schema_version", f"this aligndistil reads version 1, not {self.schema_version}; upgrade it")
        return self
