"""What of a recipe contradicts itself and may be meant all the same: a sentence each, and nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aligndistil.batch import DataKind
from aligndistil.commands.data_checks import ReadStage, existing
from aligndistil.errors import ServiceError
from aligndistil.models import load_tokenizer
from aligndistil.objectives.base import ImplicitReward, Role
from aligndistil.recipe import Model, Recipe, Stage, stage_of
from aligndistil.training import is_code
from aligndistil.training.batches import Schedule

_LARGEST_RATE = 0.1
"""AdamW moves every weight by about its learning rate in each step, and weights are of this size."""
_COMPARED = (Role.REVERSE_TEACHER, Role.REFERENCE)
"""What a teacher's log-probabilities are compared with: where both are one model, nothing is left."""


def contradictions(recipe: Recipe, read: Mapping[str, ReadStage | ServiceError]) -> list[str]:
    """Sentences `recipe.yaml:12:7: stages.x.objective.beta0: ...` about the stages whose data were read.

    Raises UserError when a tokenizer cannot be loaded.
    """
    found: list[str] = []
    for name, of_stage in read.items():
        stage = recipe.stages[name]
        found += _of_training(stage)
        found += _of_models(recipe, stage)
        found += _of_teachers(recipe, stage)
        if isinstance(of_stage, ReadStage):
            found += _of_templates(recipe, stage, of_stage)
            found += _beyond_the_end(stage, of_stage)
    return list(dict.fromkeys(found))  # what stands above `stages` is said once


def _of_training(stage: Stage) -> Iterator[str]:
    train = stage.train
    for field in ("learning_rate", "critic_learning_rate"):
        rate = getattr(train, field)
        if rate is not None and rate > _LARGEST_RATE:
            yield (
                f"{stage.where('train', field)}: {rate:g} moves every weight by about {rate:g} in each step, which "
                "leaves nothing of the model; usual are 1e-7 to 1e-3"
            )
    if train.warmup_ratio > 0.5:
        yield f"{stage.where('train', 'warmup_ratio')}: {train.warmup_ratio:g} of the training is warm-up; usual is 0.1"
    if train.lr_scheduler == "constant" and train.min_lr_ratio:
        yield f"{stage.where('train', 'min_lr_ratio')}: a constant learning rate has no floor, so this does nothing"


def _of_models(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """What the policy, the teacher and the reference are, against what they should be."""
    reference, teacher = stage.models.get(Role.REFERENCE), stage.models.get(Role.TEACHER)
    if reference not in (None, stage.model.path):
        yield (
            f"{stage.where('models', 'reference')}: the policy starts from {stage.model.path} and is compared with "
            f"{reference}, so that it is away from its reference before the first step"
        )
    for role in _COMPARED:
        if teacher is not None and stage.models.get(role) == teacher:
            yield (
                f"{stage.where('models', role)}: {teacher} is the teacher too, so that the reward, which is how the "
                "two differ, is zero everywhere"
            )
    paths = {("model", "path"): stage.model.path} | {("models", role): path for role, path in stage.models.items()}
    for where, path in paths.items():
        source, reverse = _stage_named(recipe, path), where[1] == Role.REVERSE_TEACHER
        of_pairs = source is not None and source.objective.data is DataKind.PAIRS
        if source is None or not of_pairs or source.data.reverse_preferences == reverse:
            continue
        learnt = "preferences as they are, and a reverse teacher reversed ones" if reverse else "reversed preferences"
        yield f"{stage.where(*where)}: stage {source.name} learns {learnt} (data.reverse_preferences)"


def _of_teachers(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """Whether the teachers are what the reward takes them for: log-ratios to one reference, times one beta."""
    field = stage.objective.teacher_beta
    if not field:
        return
    references: dict[str, str] = {}
    for role in (Role.TEACHER, Role.REVERSE_TEACHER):
        path = stage.models.get(role)
        source = None if path is None else _stage_named(recipe, path)
        if source is None:
            continue
        objective = source.objective
        if objective.implicit_reward is not ImplicitReward.LOG_RATIO:
            yield (
                f"{stage.where('models', role)}: stage {source.name} trains `{objective.name}`, whose reward is not "
                f"the log-ratio to a reference that `{stage.objective.name}` takes it for"
            )
            continue
        references[source.name] = source.models.get(Role.REFERENCE, "")
        beta, ours = getattr(objective, "beta", None), getattr(stage.objective, field)
        if isinstance(beta, float) and beta != ours:
            yield (
                f"{stage.where('objective', field)}: {ours:g} is not the beta that stage {source.name}, its "
                f"{role.replace('_', ' ')}, is trained with, {beta:g}"
            )
    if len(set(references.values())) > 1:
        both = " and ".join(f"{name} {reference}" for name, reference in references.items())
        yield f"{stage.where('models')}: the teachers have different references ({both}), which do not cancel"


def _of_templates(recipe: Recipe, stage: Stage, read: ReadStage) -> Iterator[str]:
    """Models that judge the policy's tokens in conversations of another form."""
    for role, path in stage.models.items():
        if is_code(path) or (stage.objective.needs[role].is_scalar and stage.objective.reads_last_score):
            continue
        name = stage_of(path)
        section = Model(path=path) if name is None else recipe.stages[name].model
        try:
            template = load_tokenizer(existing(recipe, path), section).chat_template
        except ServiceError:
            continue
        if template is not None and template != read.data.tokenizer.chat_template:
            yield (
                f"{stage.where('models', role)}: the chat template of {path} is another than the policy's, which "
                "it is given here"
            )


def _beyond_the_end(stage: Stage, read: ReadStage) -> Iterator[str]:
    steps = Schedule.of(stage, len(read.data.train)).total_steps
    for section in ("evaluation", "checkpoint"):
        every = getattr(stage, section).every
        if isinstance(every, int) and every > steps:
            yield f"{stage.where(section, 'every')}: the stage has {steps} steps, so that {every} never comes"


def _stage_named(recipe: Recipe, path: str) -> Stage | None:
    name = stage_of(path)
    return None if name is None else recipe.stages[name]
