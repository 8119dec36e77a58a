"""The rewards that a recipe's models stand for, and how they rank pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from aligndistil.data import PromptReader
from aligndistil.evaluation.measurements import EvalSet, Measurements
from aligndistil.models import load_tokenizer, reads_tokens
from aligndistil.objectives.base import ImplicitReward, Role
from aligndistil.recipe import Stage, stage_of
from aligndistil.training import TextReader

ScoredPairs: TypeAlias = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""By row and split, of the chosen and the rejected response of each pair."""
Lengths: TypeAlias = Mapping[str, Sequence[Sequence[int]]]
"""By split, the same."""


class Reward(NamedTuple):
    """What a response is worth: what row `model` gives it (a score, or log-probability), less what `against` does."""

    kind: Literal["score", "implicit", "contrastive"]
    model: str
    against: str | None = None
    per_token: bool = False
    """Whether it is divided by the response's length, as SimPO's."""

    @property
    def name(self) -> str:
        return self.model if self.against is None else f"{self.model} / {self.against}"

    def right(self, pairs: ScoredPairs, lengths: Lengths, split: str) -> str:
        """A 1 for each pair whose chosen response is worth more, a 0 for less, and `=` for a tie.

        `pairs` are the `EvalResult.pairs` of each row, `lengths` the numbers of response tokens of each pair.
        """
        values = pairs[self.model][split]
        others = [(0.0, 0.0)] * len(values) if self.against is None else pairs[self.against][split]
        marks = ""
        for (a, b), (c, d), (n, m) in zip(values, others, lengths[split], strict=True):
            chosen, rejected = (a - c, b - d) if not self.per_token else ((a - c) / n, (b - d) / m)
            marks += "1" if chosen > rejected else "0" if chosen < rejected else "="
        return marks


def own_reward(measurements: Measurements, name: str) -> Reward | None:
    """What the trained model of a stage says a response is worth; None where its objective gives it no reward.

    A scalar head's score; the log-ratio to the reference that the stage itself was trained with; or, as in SimPO, the
    mean log-probability of its tokens. Constant factors (beta) rank no pair differently, and are left out.
    """
    stage = measurements.recipe.stages[name]
    if name in measurements.scalar:
        return Reward("score", name)
    if stage.objective.implicit_reward is ImplicitReward.MEAN_LOGP:
        return Reward("implicit", name, per_token=True)
    if stage.objective.implicit_reward is ImplicitReward.LOG_RATIO and Role.REFERENCE in stage.models:
        return Reward("implicit", name, measurements.row_of(stage.models[Role.REFERENCE]))
    return None


def contrastive_rewards(measurements: Measurements) -> list[Reward]:
    """Of a teacher and its reverse teacher, or of two stages that differ in `data.reverse_preferences` only."""
    stages = measurements.recipe.stages
    opposite = [
        (stage.models[Role.TEACHER], stage.models[Role.REVERSE_TEACHER])
        for stage in stages.values()
        if Role.TEACHER in stage.models and Role.REVERSE_TEACHER in stage.models
    ]
    opposite += [
        (f"stage:{name}", f"stage:{other.name}")
        for name, stage in stages.items()
        for other in stages.values()
        if not (stage.data.reverse_preferences or stage.objective.is_scalar) and _is_reverse(other, stage)
    ]
    rows = {path: name for name, path in measurements.models.items()}
    return [Reward("contrastive", rows[a], rows[b]) for a, b in dict.fromkeys(opposite) if a in rows and b in rows]


def _is_reverse(stage: Stage, of: Stage) -> bool:
    turned = of.data.model_copy(update={"reverse_preferences": True})
    same = (stage.objective, stage.model, stage.models) == (of.objective, of.model, of.models)
    return same and (stage.data, stage.train) == (turned, of.train)


def text_reader(measurements: Measurements, eval_set: EvalSet, locate: Callable[[str], str]) -> TextReader | None:
    """What tells the samples to a reward model that has other tokens than the policies; None for one that has theirs.

    Raises UserError when it cannot read all prompts.
    """
    path, stage = measurements.reward, measurements.reference_stage
    if path is None:
        return None
    tokenizer, name = eval_set.tokenizer, stage_of(path)
    section = stage.model if name is None else measurements.recipe.stages[name].model
    if reads_tokens(tokenizer, load_tokenizer(locate(path), section)):
        return None
    policy = PromptReader(tokenizer, eval_set.stop_ids, stage.model.chat_template_kwargs)
    reader = TextReader(path, locate(path), section, policy)
    reader.check(eval_set.prompts)
    return reader
