"""The models of a stage, loaded and put on the engine."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from aligndistil.data import PromptReader
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.engine.teacher_cache import CachedModel
from aligndistil.errors import UserError
from aligndistil.models import (
    Bases,
    check_same_tokenizer,
    load_tokenizer,
    reads_tokens,
    shared_vocab,
)
from aligndistil.objectives.base import Need, Role
from aligndistil.recipe import Stage
from aligndistil.training.data import StageData
from aligndistil.training.python_reward import PythonReward, is_code
from aligndistil.training.teacher_cache import cached_model, caches
from aligndistil.training.text_reward import TextReader, TextReward


def build_engine(
    stage: Stage, data: StageData, locate: Callable[[str], str], processes: Processes, total_steps: int, bases: Bases
) -> Engine:
    """Load every model that the objective names. Raises UserError when one does not fit."""
    needs = stage.objective.needs
    start = locate(stage.model.path)
    if stage.objective.is_scalar:
        policy = bases.scalar_model(start, trained=True)
    else:
        policy = bases.language_model(start, trained=True)
    frozen: dict[str, PreTrainedModel] = {}
    critic: PreTrainedModel | None = None
    reward: PythonReward | None = None
    reader: TextReader | None = None
    for role, path in stage.models.items():
        if is_code(path):
            reward = PythonReward(path, data.tokenizer)
            continue
        folder = locate(path)
        tokenizer = load_tokenizer(folder, stage.model)
        if role == Role.REWARD and stage.objective.reads_last_score and not reads_tokens(data.tokenizer, tokenizer):
            reader = _text_reader(stage, path, folder, data)
        else:
            check_same_tokenizer(path, data.tokenizer, tokenizer, extra_allowed=needs[role].is_scalar)
        if role == Role.CRITIC:
            critic = bases.scalar_model(folder, trained=True)
        elif needs[role].is_scalar:
            frozen[role] = bases.scalar_model(folder)
        else:
            frozen[role] = bases.language_model(folder)
    if needs.get(Role.REWARD) is Need.NORMALIZED_SCORE and not (
        Role.REWARD in frozen and hasattr(frozen[Role.REWARD].config, "score_mean")
    ):
        raise UserError(
            f"{stage.where('models', 'reward')}: the objective normalizes scores, and this reward has no mean and "
            "standard deviation of its scores; train it as a stage with eval data, or switch the normalization off"
        )
    others = (model for role, model in frozen.items() if role != Role.REWARD or reader is None)
    vocab = shared_vocab([policy, *others, *([critic] if critic else [])], data.tokenizer)
    read: dict[str, PreTrainedModel | CachedModel] = {}
    for role in list(frozen):
        model = frozen.pop(role)
        if caches(stage) and not needs[role].is_scalar:
            read[role] = cached_model(role, model, locate(stage.models[role]), vocab, stage, data, processes)
        else:
            read[role] = model
        del model  # of a cached one, only the head is still there when the policy is given its memory
    return Engine(
        policy,
        read,
        stage.objective,
        train=stage.train,
        settings=stage.engine,
        processes=processes,
        total_steps=total_steps,
        vocab=vocab,
        critic=critic,
        reward=reward,
        temperature=stage.objective.trained_at(stage.rollout.temperature) if stage.rollout else 1.0,
        through=None if reader is None else lambda model: TextReward(model, reader, data.tokenizer),
    )


def _text_reader(stage: Stage, path: str, folder: str, data: StageData) -> TextReader:
    """For a reward model of another tokenizer, after it was tried on all prompts. Raises UserError where it fails."""
    policy = PromptReader(data.tokenizer, data.stop_ids, stage.model.chat_template_kwargs)
    reader = TextReader(path, folder, stage.model, policy)
    try:
        reader.check(data.train.prompt_ids(i) for i in range(len(data.train)))
    except UserError as error:
        raise UserError(f"{stage.where('models', 'reward')}: {error}") from None
    return reader
