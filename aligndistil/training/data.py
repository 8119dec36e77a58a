"""The tokenizer and the examples of a stage, read before any weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind
from aligndistil.data import Examples, gives, load_examples, sources_of
from aligndistil.data.reviews import gold_rewards
from aligndistil.models import load_tokenizer, stop_ids
from aligndistil.progress import Steps
from aligndistil.recipe import Data, Stage

Locate = Callable[[str], str]
"""A model path of the recipe to the folder or Hub id to load."""
GoldReward = Callable[[Sequence[str]], list[float]]
"""The rewards of texts."""
_GOLD: dict[str, GoldReward] = {"builtin:reviews": gold_rewards}
"""Data whose reward is known exactly."""


@dataclass(frozen=True, slots=True)
class StageData:
    """What a stage reads."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    train: Examples
    eval: Examples | None
    """Of the objective's own kind."""
    eval_prompts: Examples | None


def load_stage_data(stage: Stage, locate: Locate, *, rank: int = 0) -> StageData:
    """Read, check and encode the data of a stage. Raises UserError when the run must not start with it."""
    path = locate(stage.model.path)
    tokenizer = load_tokenizer(path, stage.model)
    stops = stop_ids(path, stage.model, tokenizer)

    def load(which: Literal["train", "eval"], kind: DataKind) -> Examples:
        what = "prompts" if kind is DataKind.PROMPTS else "data"
        with Steps(f"{stage.name}: reading {which} {what}", unit="rows", rank=rank) as steps:

            def on_progress(done: int, total: int) -> None:
                steps.total = total
                steps.advance(done - steps.done)

            return load_examples(
                stage.data,
                which,
                kind,
                tokenizer,
                stops,
                template_kwargs=stage.model.chat_template_kwargs,
                seed=stage.train.seed,
                on_progress=on_progress,
            )

    kind = stage.objective.data
    train = load("train", DataKind.PROMPTS if stage.on_policy else kind)
    has_eval = stage.data.eval is not None
    # Prompts alone are enough for the eval data of an on-policy stage: there is then no loss on given responses.
    scored = has_eval and (not stage.on_policy or gives(stage.data, "eval", kind))
    return StageData(
        tokenizer,
        stops,
        train,
        load("eval", kind) if scored else None,
        load("eval", DataKind.PROMPTS) if has_eval else None,
    )


def gold_reward_of(data: Data) -> GoldReward | None:
    """The gold reward of texts, where the data knows one."""
    for source in sources_of(data, "eval") or data.train:
        if source.path in _GOLD:
            return _GOLD[source.path]
    return None
