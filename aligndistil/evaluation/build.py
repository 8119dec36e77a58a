"""The prompts and pairs of a recipe's comparison, read once and put into an `Evaluator`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind, Row
from aligndistil.data import Examples, gives, load_examples
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import Scorer as RewardModel
from aligndistil.evaluation.bench import Bench
from aligndistil.evaluation.model import Evaluator
from aligndistil.evaluation.plan import Plan
from aligndistil.models import load_tokenizer, stop_ids
from aligndistil.recipe import Data, Model, Recipe
from aligndistil.rollout import SamplingParams
from aligndistil.training import scorer_of

Split: TypeAlias = Literal["train", "eval"]
_Pairs: TypeAlias = dict[str, list[list[Row]]]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Examples as one model's tokenizer and chat template make them, with preferences the right way round."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    seed: int

    def examples(self, data: Data, which: Split, kind: DataKind) -> Examples:
        data = data.model_copy(update={"reverse_preferences": False})
        template = self.tokenizer.chat_template
        return load_examples(data, which, kind, self.tokenizer, self.stop_ids, template, seed=self.seed)

    def reads_like(self, other: _Reader) -> bool:
        """Whether the same text has the same tokens."""
        mine, theirs = self.tokenizer, other.tokenizer
        same = mine.get_vocab() == theirs.get_vocab() and mine.chat_template == theirs.chat_template
        return same and self.stop_ids == other.stop_ids


def bench_of(recipe: Recipe, plan: Plan, locate: Callable[[str], str]) -> Bench:
    """Read the data of a plan; no model is loaded. Raises UserError when data or tokenizers cannot be read."""
    settings, judge = recipe.report, plan.judge

    def reader(path: str, section: Model) -> _Reader:
        tokenizer = load_tokenizer(locate(path), section)
        return _Reader(tokenizer, stop_ids(locate(path), section, tokenizer), settings.seed)

    mine = reader(plan.initial, judge.model)
    scalar = {name: reader(plan.models[name], recipe.stages[name].model) for name in sorted(plan.scalar)}
    foreign = {name: other for name, other in scalar.items() if not other.reads_like(mine)}
    pairs, foreign_pairs = _pairs(plan, mine, foreign, settings.pairs)
    examples = mine.examples(judge.data, "eval", DataKind.PROMPTS)
    prompts = [examples.prompt_ids(i) for i in range(min(settings.samples, len(examples)))]
    return Bench(mine.tokenizer, mine.stop_ids, prompts, pairs, foreign_pairs)


def evaluator_of(
    recipe: Recipe, plan: Plan, bench: Bench, processes: Processes, reward: RewardModel | None
) -> Evaluator:
    """What measures every model of the plan."""
    settings, judge = recipe.report, plan.judge
    return Evaluator(
        bench=bench,
        given=[chosen for chosen, _ in bench.pairs.get("eval", [])[: settings.samples]],
        params=SamplingParams(settings.max_new_tokens or judge.data.max_response_length),
        batch_size=settings.batch_size,
        seed=settings.seed,
        processes=processes,
        scorer=scorer_of(judge.data),
        reward=reward,
    )


def _pairs(
    plan: Plan, mine: _Reader, foreign: Mapping[str, _Reader], limit: int | None
) -> tuple[_Pairs, dict[str, _Pairs]]:
    """Eval pairs and, where they are asked for, as many training pairs; for each tokenizer the same ones."""
    sources: list[tuple[Split, Data]] = []
    if gives(plan.judge.data, "eval", DataKind.PAIRS):
        sources.append(("eval", plan.judge.data))
        if plan.train_pairs is not None:
            sources.append(("train", plan.train_pairs.data))
    pairs: _Pairs = {}
    others: dict[str, _Pairs] = {name: {} for name in foreign}
    for split, data in sources:
        read = {name: _by_key(one.examples(data, split, DataKind.PAIRS)) for name, one in foreign.items()}
        own = _by_key(mine.examples(data, split, DataKind.PAIRS))
        keys = [key for key in own if all(key in examples for examples in read.values())][:limit]
        limit = len(keys)
        pairs[split] = [own[key] for key in keys]
        for name, examples in read.items():
            others[name][split] = [examples[key] for key in keys]
    return pairs, others


def _by_key(examples: Examples) -> dict[str, list[Row]]:
    """A pair that the data's weights repeat counts once."""
    return {examples.key(i): examples.rows(i) for i in range(len(examples))}
