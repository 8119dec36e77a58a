"""`Stage` and `Recipe`: what was written, with defaults filled in and references resolved, and everything checked.

A stage's fields are the sections that a person writes. Its validators are the rules between them: each runs when the
sections it reads are right by themselves, and reports to the `Draft` that it is given instead of raising, so that a
person is shown everything that is wrong at once.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
)

from aligndistil import objectives
from aligndistil.errors import UserError, listed
from aligndistil.objectives.base import Objective, OnPolicy, Prepares, Role, Sampled
from aligndistil.recipe.problems import Problem, problem_at
from aligndistil.recipe.sections import (
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Logging,
    Model,
    Report,
    Rollout,
    Section,
    Train,
    models_section,
)
from aligndistil.recipe.yaml_positions import Node

CODE = "python:"
"""How the path of a reward starts that is a function instead of a model."""

STAGE = "stage:"
"""How the path of a model starts that another stage ends with."""


def stage_of(path: str) -> str | None:
    """`dpo` of `stage:dpo`; None for any other path."""
    return path.removeprefix(STAGE) if path.startswith(STAGE) else None


def models_named_by(objective: Objective) -> list[str]:
    """The roles that `models` must name: all but the policy."""
    return [str(role) for role in objective.needs if role != Role.POLICY]


@dataclass
class Draft:
    """A stage while it is checked."""

    name: str
    own: Node
    """What the stage says itself, without nulls."""
    written: Node
    """The same over what stands above `stages`: sections that were never written are empty."""
    problems: list[Problem] = field(default_factory=list)
    objective: Objective | None = None
    """None where it is not right by itself."""

    def wrote(self, path: str) -> Node | None:
        """What the stage says itself at a path such as `train.seed`."""
        return self.own.find(path.split("."))

    def refuse(self, path: str, text: str) -> None:
        """A problem with a value, or with one that is missing."""
        self.problems.append(problem_at(self.written, tuple(path.split(".")), text))

    def refuse_key(self, path: str, text: str) -> None:
        """A problem with something that should not be there at all."""
        self.problems.append(problem_at(self.written, tuple(path.split(".")), text, key=True))


class Stage(Section):
    """One training run of a recipe: an objective, the models it needs and the data it is trained on."""

    objective: Objective
    """What is minimized; its other fields are the hyperparameters."""
    model: Model
    models: dict[str, str]
    data: Data
    rollout: Rollout | None = Field(default=None, validate_default=True)
    train: Train
    engine: Engine
    evaluation: Evaluation
    checkpoint: Checkpoint
    logging: Logging
    _draft: Draft = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        self._draft = context

    @property
    def name(self) -> str:
        return self._draft.name

    @property
    def written(self) -> Node:
        """Where the fields were written."""
        return self._draft.written

    @property
    def on_policy(self) -> bool:
        return self.rollout is not None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose models this one uses, without repetition."""
        names = [stage_of(path) for path in (self.model.path, *self.models.values())]
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def where(self, *path: str | int) -> str:
        """`recipes/x.yaml:12:7: stages.dpo.model.path` for `("model", "path")`: how a sentence about a field starts.

        A field that was not written is placed where its section or its stage was.
        """
        return self.written.where(path)

    def check_processes(self, processes: int) -> None:
        """Raises UserError when a batch, or its groups, cannot be split evenly over this many processes."""
        batch, micro = self.train.batch_size, self.train.micro_batch_size
        group = self.rollout.samples_per_prompt if self.rollout is not None and self.objective.groups else 1
        if batch % (micro * processes):
            wrong = f"{batch} is not a multiple of micro_batch_size x processes = {micro} x {processes}"
        elif (batch // processes) % group:
            wrong = (
                f"`{self.objective.name}` compares the samples of one prompt with each other, and the "
                f"{batch} / {processes} = {batch // processes} responses of a process are not a multiple of "
                f"rollout.samples_per_prompt, {group}"
            )
        else:
            return
        unit = math.lcm(micro, group) * processes
        below, above = batch - batch % unit, batch - batch % unit + unit
        instead = f"{below} or {above}" if below else str(above)
        raise UserError(f"{self.where('train', 'batch_size')}: {wrong}; use {instead}, or another number of processes")

    def resolved(self) -> dict[str, Any]:
        """Every section with every field, in JSON's types; what a stage would look like that relied on no default."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        plain = {
            name: value.model_dump(mode="json") if isinstance(value, Section | Objective) else value
            for name, value in values.items()
        }
        plain["models"] = dict(self.models)
        if self.train.max_steps is not None:
            del plain["train"]["epochs"]
        return plain

    @field_validator("objective")
    @classmethod
    def _kept_for_other_stages(cls, objective: Objective, info: ValidationInfo) -> Objective:
        _draft(info).objective = objective
        return objective

    @field_validator("models")
    @classmethod
    def _models_of_just_the_roles_it_reads(cls, given: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        """A role that only stands above `stages` is another stage's."""
        draft, objective = _draft(info), _draft(info).objective
        if objective is None:
            return given
        needed = models_named_by(objective)
        for role, path in given.items():
            if path.startswith(CODE) and role != Role.REWARD:
                draft.refuse(f"models.{role}", "only `reward` may be a Python function; name a model")
            elif path.startswith(CODE) and (len(path.split(":")) != 3 or not all(path.split(":"))):
                draft.refuse(f"models.{role}", "write `python:MODULE:FUNCTION`")
        for role in needed:
            if role not in given:
                kinds = "a folder, a Hub id, `builtin:NAME` or `stage:NAME`"
                draft.refuse(f"models.{role}", f"`{objective.name}` needs this model: give {kinds}")
        for role in given:
            if role not in needed and draft.wrote(f"models.{role}") is not None:
                reads = f"it reads {listed(needed)}" if needed else "it compares with no other model"
                draft.refuse_key(
                    f"models.{role}", f"`{objective.name}` does not read this model ({reads}); remove the line"
                )
        return {role: given[role] for role in needed if role in given}

    @field_validator("rollout")
    @classmethod
    def _rollout_where_it_samples(cls, rollout: Rollout | None, info: ValidationInfo) -> Rollout | None:
        """A rollout that only stands above `stages`, and what an objective cannot use of it, are another stage's."""
        draft, objective = _draft(info), _draft(info).objective
        if objective is None:
            return rollout
        if objective.on_policy is OnPolicy.NEVER:
            if draft.wrote("rollout") is not None:
                text = f"`{objective.name}` learns from data alone and samples nothing; remove this section"
                draft.refuse_key("rollout", text)
            return None
        if rollout is None:
            if objective.on_policy is OnPolicy.ALWAYS or objective.groups:
                example = "max_new_tokens: 256" + (", samples_per_prompt: 4" if objective.groups else "")
                text = f"`{objective.name}` learns from its own samples; write for example `rollout: {{{example}}}`"
                draft.refuse("rollout", text)
            return None
        if objective.groups and rollout.samples_per_prompt < 2:
            text = f"`{objective.name}` compares the samples of one prompt with each other: write 2 or more"
            draft.refuse("rollout.samples_per_prompt", text)
        if objective.sampled is not Sampled.STATES:
            learns = f"`{objective.name}` learns from samples of the policy that it trains"
            if objective.sampled is Sampled.ITSELF and rollout.temperature != 1:
                text = f"{learns}, and this samples from another one, of which its gradient would be wrong: write 1"
                draft.refuse("rollout.temperature", text)
            if rollout.top_p != 1:
                text = f"{learns}, and what this cuts off has a probability in its loss: write 1"
                draft.refuse("rollout.top_p", text)
        if objective.prepares is Prepares.ROLLOUT:
            return rollout
        return rollout.model_copy(update={"responses": None, "epochs": 1})

    @field_validator("train")
    @classmethod
    def _batches_that_divide(cls, train: Train, info: ValidationInfo) -> Train:
        draft, objective = _draft(info), _draft(info).objective
        rollout: Rollout | None = info.data.get("rollout")
        batch, parts = train.batch_size, {"train.micro_batch_size": train.micro_batch_size}
        if rollout is not None:
            parts["rollout.samples_per_prompt"] = rollout.samples_per_prompt
        for name, part in parts.items():
            if batch % part:
                draft.refuse("train.batch_size", f"{batch} is not a multiple of {name}, {part}")
        if objective is None:
            return train
        if Role.CRITIC not in objective.needs:
            if draft.wrote("train.critic_learning_rate") is not None:
                draft.refuse_key("train.critic_learning_rate", f"`{objective.name}` trains no critic; remove the line")
            train = train.model_copy(update={"critic_learning_rate": None})
        if objective.prepares is Prepares.MISMATCHED and batch < 2:
            text = f"`{objective.name}` compares each prompt with the response of another example: write 2 or more"
            draft.refuse("train.batch_size", text)
        if rollout is not None and objective.prepares is not Prepares.ROLLOUT:
            for path, once in (("rollout.responses", None), ("rollout.epochs", 1)):
                wrote = draft.wrote(path)
                if wrote is not None and wrote.value != once:
                    text = f"`{objective.name}` takes one optimizer step on each rollout; remove the line"
                    draft.refuse_key(path, text)
        elif rollout is not None and rollout.responses is not None and rollout.responses % batch:
            draft.refuse("rollout.responses", f"{rollout.responses} is not a multiple of train.batch_size, {batch}")
        return train

    @field_validator("engine", mode="before")
    @classmethod
    def _cached_teachers_of_known_rows(cls, engine: Any, info: ValidationInfo) -> Any:
        """Hidden states can be kept only of rows that are known beforehand."""
        draft, objective = _draft(info), _draft(info).objective
        wrote = draft.wrote("engine.teacher_cache")
        if objective is None or wrote is None or wrote.value is False:
            return engine
        if info.data.get("rollout") is not None:
            text = "the responses of this stage are sampled while it trains; remove the line"
            draft.refuse_key("engine.teacher_cache", text)
        elif objective.prepares is not Prepares.NOTHING or not models_named_by(objective):
            text = f"`{objective.name}` reads no frozen model on the rows of the data alone; remove the line"
            draft.refuse_key("engine.teacher_cache", text)
        return engine

    @field_validator("evaluation")
    @classmethod
    def _data_to_evaluate_on(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        data: Data | None = info.data.get("data")
        for key in ("every", "samples"):
            if data is not None and data.eval is None and getattr(evaluation, key):
                _draft(info).refuse(f"evaluation.{key}", "there is nothing to evaluate on; name it in data.eval")
        if evaluation.kl_initial and not evaluation.samples:
            _draft(info).refuse("evaluation.kl_initial", "it is measured on sampled answers; say how many in `samples`")
        return evaluation


def _draft(info: ValidationInfo) -> Draft:
    return cast(Draft, info.context)


def stage_class() -> type[Stage]:
    """`Stage` with the objectives and the roles that are registered now: other packages may bring both."""
    return _stage_class(tuple(objectives.registry().items()), tuple(objectives.roles().items()))


@functools.cache
def _stage_class(known: tuple[tuple[str, type[Objective]], ...], roles: tuple[tuple[str, str], ...]) -> type[Stage]:
    one_of = functools.reduce(operator.or_, (Annotated[cls, Tag(name)] for name, cls in known))
    description = Stage.model_fields["objective"].description
    fields: dict[str, Any] = {
        "objective": (Annotated[one_of, Discriminator(_name_of_objective), Field(description=description)], ...),
        "models": (Annotated[models_section(dict(roles)), AfterValidator(_given)], ...),
    }
    return cast("type[Stage]", create_model("Stage", __base__=Stage, __doc__=Stage.__doc__, **fields))


def _given(models: Section) -> dict[str, str]:
    return models.model_dump(exclude_none=True)


def _name_of_objective(written: Any) -> str | None:
    name = written.get("name") if isinstance(written, dict) else getattr(written, "name", None)
    return None if name is None else str(name)


STAGE_KEYS = tuple(Stage.model_fields)
"""The sections that may stand in a stage, and above `stages`."""


@dataclass(frozen=True)
class Recipe:
    """Stages in an order in which each comes after those it uses."""

    name: str
    output_dir: Path
    stages: dict[str, Stage]
    report: Report
    path: Path
    """The file."""
    source_text: str
    """The file's text, as its author wrote it: without overrides, and without what it extends."""
    written: Node = field(repr=False, compare=False)

    def where(self, *path: str | int) -> str:
        """`recipes/x.yaml:3:1: report.kl_to` for `("report", "kl_to")`."""
        return self.written.where(path)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default filled in, in JSON's types.

        Written as YAML it is a recipe of the same stages, which extends no other. Its paths that start with `./` or
        `../` are relative to the current folder, so that file belongs there.
        """
        return {
            "schema_version": 1,
            "name": self.name,
            "output_dir": str(self.output_dir),
            "report": self.report.model_dump(mode="json"),
            "stages": {name: stage.resolved() for name, stage in self.stages.items()},
        }
