"""What a recipe's comparison measures: which models, against what, and on which prompts and pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind, Row
from aligndistil.data import Examples, gives, load_examples
from aligndistil.models import load_tokenizer, stop_ids
from aligndistil.objectives.base import Role
from aligndistil.recipe import CODE, Data, Model, Recipe, Stage, stage_of

INITIAL = "initial"
"""The row of the model that training began from."""
Split: TypeAlias = Literal["train", "eval"]
Pairs: TypeAlias = Mapping[str, Sequence[Sequence[Row]]]
"""By split; a pair is its chosen and its rejected row."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """The rows of a comparison, and what they share. Models are paths of the recipe, `stage:NAME` or others."""

    recipe: Recipe
    reference_stage: Stage
    """The stage whose eval data, tokenizer and model settings all models are measured with."""
    initial: str
    """What the reference stage's training goes back to."""
    kl_to: str
    """What divergence is measured to."""
    reward: str | None
    """What scores the samples, beside an exact reward."""
    models: dict[str, str]
    """By row, the initial model first."""
    references: dict[str, str]
    """The same of models that are no row, which stages are trained against: only the pairs are asked of them."""
    scalar: frozenset[str]
    """Rows whose model has a scalar head."""
    train_pairs: Stage | None
    """Whose training pairs are ranked too; None when the recipe does not ask for it, or has none."""

    def row_of(self, path: str) -> str:
        """What a model is measured as."""
        return next(name for name, other in (self.models | self.references).items() if other == path)


def measurements_of(recipe: Recipe) -> Measurements | None:
    """None when no stage has eval data."""
    stages = list(recipe.stages.values())
    with_eval = [stage for stage in stages if stage.data.eval]
    if not with_eval:
        return None
    reference_stage = next((stage for stage in reversed(with_eval) if not stage.objective.is_scalar), with_eval[-1])
    initial = initial_model(recipe, reference_stage)
    teachers = [stage.models[Role.TEACHER] for stage in stages if Role.TEACHER in stage.models]
    given = [stage.models[Role.REWARD] for stage in stages if Role.REWARD in stage.models]
    trained = [f"stage:{stage.name}" for stage in stages if stage.objective.is_scalar]
    # The later of a list counts, and a reward model that the recipe trains before one that it is given.
    rewards = [path for path in given if not path.startswith(CODE)] + trained
    train_pairs = None
    if recipe.report.reward_accuracy:
        candidates = (reference_stage, *stages)
        train_pairs = next((stage for stage in candidates if gives(stage.data, "train", DataKind.PAIRS)), None)
    models = {INITIAL: initial} | {name: f"stage:{name}" for name in recipe.stages}
    against = [stage.models[Role.REFERENCE] for stage in stages if Role.REFERENCE in stage.models]
    others = [path for path in dict.fromkeys(against) if path not in models.values()]
    return Measurements(
        recipe=recipe,
        reference_stage=reference_stage,
        initial=initial,
        kl_to=recipe.report.kl_to or [initial, *teachers][-1],
        reward=recipe.report.reward or next(reversed(rewards), None),
        models=models,
        references={f"reference.{i}": path for i, path in enumerate(others)},  # no stage has a dot
        scalar=frozenset(stage.name for stage in stages if stage.objective.is_scalar),
        train_pairs=train_pairs,
    )


def initial_model(recipe: Recipe, stage: Stage) -> str:
    """What the training of a stage goes back to, through the stages it starts from."""
    while (name := stage_of(stage.model.path)) is not None:
        stage = recipe.stages[name]
    return stage.model.path


def sha256(*parts: Any) -> str:
    """Hex digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The prompts and pairs that all models of a comparison are measured on, as token ids."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    prompts: Sequence[Sequence[int]]
    """Each model answers each of them once."""
    responses: Sequence[Row]
    """Chosen responses of the data: divergences are measured on them too."""
    pairs: Pairs
    pairs_by_tokenizer: Mapping[str, Pairs] = field(default_factory=dict)
    """The same pairs for scalar models that have another tokenizer: by the model's row, in its tokens."""

    @property
    def lengths(self) -> dict[str, list[list[int]]]:
        """Response tokens of the chosen and the rejected response of each pair, by split."""
        return {
            split: [[len(row.response_ids) for row in pair] for pair in pairs] for split, pairs in self.pairs.items()
        }

    def content_hash(self) -> str:
        """SHA-256 of the prompts and pairs, and of the tokens that end an answer."""
        return sha256(sorted(self.stop_ids), list(map(list, self.prompts)), _token_ids(self.pairs))

    def pairs_hash(self, name: str) -> str:
        """SHA-256 of the pairs that a model with another tokenizer reads; empty for a model that reads `pairs`."""
        return sha256(_token_ids(self.pairs_by_tokenizer[name])) if name in self.pairs_by_tokenizer else ""


def _token_ids(pairs: Pairs) -> dict[str, object]:
    return {
        split: [[(list(row.prompt_ids), list(row.response_ids)) for row in pair] for pair in of_split]
        for split, of_split in pairs.items()
    }


def read_eval_set(measurements: Measurements, locate: Callable[[str], str]) -> EvalSet:
    """Read prompts, eval pairs and, where they are asked for, as many training pairs; no model is loaded.

    All tokenizers are given the same pairs: those that fit the length limits with each of them. Preferences are the
    right way round. Raises UserError when data or tokenizers cannot be read.
    """
    recipe, stage = measurements.recipe, measurements.reference_stage
    settings = recipe.report

    def tokenizer_and_stops(path: str, section: Model) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
        tokenizer = load_tokenizer(locate(path), section)
        return tokenizer, stop_ids(locate(path), section, tokenizer)

    tokenizer, stops = tokenizer_and_stops(measurements.initial, stage.model)
    tokenizers = {INITIAL: (tokenizer, stops)}
    for name in sorted(measurements.scalar):
        other, other_stops = tokenizer_and_stops(measurements.models[name], recipe.stages[name].model)
        its_kwargs = recipe.stages[name].model.chat_template_kwargs
        same = other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template
        if not same or its_kwargs != stage.model.chat_template_kwargs or other_stops != stops:
            tokenizers[name] = other, other_stops

    def examples(name: str, data: Data, split: Split, kind: DataKind) -> Examples:
        reader, its_stops = tokenizers[name]
        data = data.model_copy(update={"reverse_preferences": False})
        kwargs = (stage if name == INITIAL else recipe.stages[name]).model.chat_template_kwargs
        return load_examples(data, split, kind, reader, its_stops, template_kwargs=kwargs, seed=settings.seed)

    sources: list[tuple[Split, Data]] = []
    if gives(stage.data, "eval", DataKind.PAIRS):
        sources.append(("eval", stage.data))
        if measurements.train_pairs is not None:
            sources.append(("train", measurements.train_pairs.data))
    pairs: dict[str, dict[str, list[list[Row]]]] = {name: {} for name in tokenizers}
    limit = settings.pairs
    for split, data in sources:
        by_key: dict[str, tuple[Examples, dict[str, int]]] = {}  # a pair that the data's weights repeat counts once
        for name in tokenizers:
            read = examples(name, data, split, DataKind.PAIRS)
            by_key[name] = read, {read.key(i): i for i in range(len(read))}
        keys = [key for key in by_key[INITIAL][1] if all(key in known for _, known in by_key.values())][:limit]
        limit = len(keys)
        for name, (read, places) in by_key.items():
            pairs[name][split] = [read.rows(places[key]) for key in keys]
    prompts = examples(INITIAL, stage.data, "eval", DataKind.PROMPTS)
    own = pairs.pop(INITIAL)
    return EvalSet(
        tokenizer,
        stops,
        prompts=[prompts.prompt_ids(i) for i in range(min(settings.samples, len(prompts)))],
        responses=[chosen for chosen, _ in own.get("eval", [])[: settings.samples]],
        pairs=own,
        pairs_by_tokenizer=pairs,
    )
