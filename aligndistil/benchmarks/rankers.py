"""What ranks responses: a scalar head, or a reward that language models stand for.

A trained one's log-probability of a response less its reference's, the mean log-probability of its tokens (SimPO), or
that of a DPO model less a reverse one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import Batch, Row
from aligndistil.benchmarks.reward_bench import Choices
from aligndistil.data import Encoder, Record
from aligndistil.data.records import Unusable
from aligndistil.engine.policy import Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.evaluation.rows import last_scores, log_probabilities, read_rows
from aligndistil.models import (
    base_of,
    check_same_tokenizer,
    load_model,
    load_scalar_model,
    load_tokenizer,
    shared_vocab,
    stop_ids,
)
from aligndistil.objectives import registry
from aligndistil.objectives.base import ImplicitReward, Objective, Role
from aligndistil.recipe import Model, stage_of
from aligndistil.run_folder import RunFolder


class Ranked(NamedTuple):
    """What a ranker made of the rows."""

    scores: list[list[float]]
    """Of each row's responses."""
    notes: list[str]
    """What has to stand under a table of it."""


@dataclass(frozen=True, slots=True)
class Ranker:
    """What scores responses: `model`, less `against` where that is given."""

    name: str
    """What tables call it."""
    kind: Literal["score", "implicit", "contrastive"]
    """A scalar head's score; or log-probabilities of a policy, less its reference's, or of a DPO model, less a reverse
    one's. Constant factors (beta) change no rank and no score of the benchmark, and are left out."""
    model: str
    """Its folder or Hub id."""
    section: Model
    """How both are loaded."""
    against: str | None = None
    per_token: bool = False
    """Whether a log-probability is divided by the response's length, as SimPO's."""

    def rank(
        self,
        rows: Sequence[Choices],
        processes: Processes,
        *,
        batch_size: int,
        max_length: int,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Ranked:
        """Score every response to every prompt, which is the user's turn, in the model's own chat template.

        A score is read at the token that ends the response, as reward models are trained here; what a template writes
        after it (Qwen's a line break) is not. A response is cut to `max_length` tokens, or to half of what the model
        reads where that is less. `on_progress` is told how many more responses are done, by each of two models.

        Raises UserError when a model cannot be loaded or has no scalar head, when both have not the same tokens, or
        when a row cannot be encoded or a score is not a number.
        """
        tokenizer = load_tokenizer(self.model, self.section)
        if self.kind == "score":
            models = [load_scalar_model(self.model, self.section, trained=False)]
        else:
            if self.against is not None:
                theirs = load_tokenizer(self.against, self.section)
                check_same_tokenizer(self.against, tokenizer, theirs, extra_allowed=True)
            paths = [self.model] if self.against is None else [self.model, self.against]
            models = [load_model(path, self.section, trained=False) for path in paths]
        contexts = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
        context = min((one for one in contexts if one), default=2**20)
        longest = min(max_length, context // 2)
        encoder = Encoder(
            tokenizer,
            stop_ids=stop_ids(self.model, self.section, tokenizer),
            max_prompt_length=context - longest,
            max_response_length=longest,
            template_kwargs=self.section.chat_template_kwargs,
            checked=False,
        )
        texts, notes = self._encode(rows, encoder)
        vocab = shared_vocab(models, tokenizer)
        columns: list[list[float]] = []
        for model in models:
            read = _reader(on_device(model, processes.device), None if self.kind == "score" else vocab)
            found = read_rows(
                texts,
                read,
                batch_size=batch_size,
                pad_token_id=tokenizer.pad_token_id,
                device=processes.device,
                on_progress=on_progress,
            )
            columns.append([value for (value,) in found])
        values = np.array(columns[0]) - (np.array(columns[1]) if len(columns) == 2 else 0.0)
        if self.per_token:
            values = values / np.array([len(text.response_ids) for text in texts])
        if not np.isfinite(values).all():
            raise UserError(f"{self.name}: {(~np.isfinite(values)).sum()} responses have no finite score; try float32")
        of_rows = iter(values.tolist())
        return Ranked([[next(of_rows) for _ in row.responses] for row in rows], notes)

    def _encode(self, rows: Sequence[Choices], encoder: Encoder) -> tuple[list[Row], list[str]]:
        """Every response of every row, after the same prompt's tokens, and notes on what was cut."""
        # A response of nothing is its end alone; the encoder knows none without a text.
        records = [Record(row.prompt, tuple(text for text in row.responses if text.strip())) for row in rows]
        texts: list[Row] = []
        cut = cut_prompts = 0
        for row, encoded in zip(rows, encoder.encode(records), strict=True):
            if isinstance(encoded, Unusable):
                raise UserError(f"{self.name}: row {row.id} of RewardBench 2 cannot be encoded: {encoded}")
            written = iter(encoded.rows)
            empty = Row(encoded.rows[0].prompt_ids, [encoder.tokenizer.eos_token_id])
            texts += [next(written) if text.strip() else empty for text in row.responses]
            cut += sum(encoded.responses_truncated)
            cut_prompts += encoded.prompt_truncated
        notes = []
        if cut:
            notes.append(
                f"{self.name}: {cut} of {len(texts)} responses were cut at {encoder.max_response_length} tokens."
            )
        if cut_prompts:
            notes.append(
                f"{self.name}: {cut_prompts} of {len(rows)} prompts were cut to their last "
                f"{encoder.max_prompt_length} tokens."
            )
        return texts, notes


def _reader(model: Any, vocab: int | None) -> Callable[[Batch], Tensor]:
    """(B, 1) of a batch: the score at the last token, or, with a vocabulary, the response's log-probability."""
    if vocab is None:
        scalar = ScalarModel(model)
        return lambda batch: last_scores(scalar, batch)
    policy = Policy(model.eval(), vocab)
    return lambda batch: log_probabilities(policy, batch)


class _Trained(NamedTuple):
    """A finished stage."""

    name: str
    path: str
    """Of its final model."""
    section: Model
    """How that is loaded."""
    objective: Objective
    models: Mapping[str, str]
    trained_as: Mapping[str, Any]
    """The sections that say how it was trained."""
    inputs: Mapping[str, str]
    """By name, the weights of the stages that it was trained with."""


def rankers_of(path: str, section: Model) -> list[Ranker]:
    """What the models at `path` stand for: a run's folder, that of one of its stages (or its `final`), or any model.

    Of a run, what each stage's own objective says (a score, the log-ratio to the reference that it was trained with,
    or SimPO's mean log-probability), and contrastive rewards: of a teacher and its reverse teacher, and of two stages
    that differ in `data.reverse_preferences` only. `section` is how a model is loaded that is no stage's; it must have
    a scalar head.

    Raises UserError when there is no reward, or when a model that one is taken against is not there any more.
    """
    folder = Path(path).expanduser()
    if folder.name == "final" and (folder.parent / "done.json").is_file():
        folder = folder.parent
    if (folder / "done.json").is_file():
        run, names = RunFolder(folder.resolve().parent), [folder.resolve().name]
    else:
        # An archived stage is called NAME.old-1; a stage's own name has no dot.
        files = [file for file in folder.glob("*/done.json") if "." not in file.parent.name]
        files.sort(key=lambda file: (file.stat().st_mtime_ns, file.parent.name))
        run, names = RunFolder(folder), [file.parent.name for file in files]
    is_model = (folder / "config.json").is_file() or base_of(str(folder)) is not None
    if not names and folder.is_dir() and not is_model:
        raise UserError(
            f"{path} holds no finished stage and no model: give a run, one of its stages, or a reward model"
        )
    if not names:
        return [Ranker(Path(path).name, "score", path, section)]
    stages = [stage for name in names if (stage := _trained(run, name)) is not None]
    found = [*chain.from_iterable(_own(run, stage) for stage in stages), *_contrastive(run, stages)]
    if not found:
        raise UserError(
            f"{path}: what was trained there ({', '.join(names)}) stands for no reward; a reward model does, and so do "
            "policies of DPO, KTO, SimPO and the like"
        )
    return list({(one.model, one.against): one for one in found}.values())


def _trained(run: RunFolder, name: str) -> _Trained | None:
    """None where the final model is gone."""
    folder = run.stage(name)
    done = folder.read_done()
    if done is None or not folder.final.is_dir():
        return None
    try:
        trained_as = {key: done.resolved[key] for key in ("objective", "model", "models", "data", "train")}
        objective = registry()[trained_as["objective"]["name"]].model_validate(trained_as["objective"])
        section = Model.model_validate(trained_as["model"])
    except (LookupError, TypeError, ValidationError) as error:
        raise UserError(
            f"{folder.path} was trained by another version of aligndistil ({type(error).__name__}): train it again"
        ) from None
    # The exported tokenizer has the chat template.
    section = section.model_copy(update={"path": str(folder.final), "chat_template": None})
    return _Trained(name, section.path, section, objective, trained_as["models"], trained_as, done.inputs)


def _own(run: RunFolder, stage: _Trained) -> Iterator[Ranker]:
    reward, reference = stage.objective.implicit_reward, stage.models.get(Role.REFERENCE)
    if stage.objective.is_scalar:
        yield Ranker(stage.name, "score", stage.path, stage.section)
    elif reward is ImplicitReward.MEAN_LOGP:
        yield Ranker(stage.name, "implicit", stage.path, stage.section, per_token=True)
    elif reward is ImplicitReward.LOG_RATIO and reference is not None:
        against = _located(run, reference, stage)
        yield Ranker(f"{stage.name} / {_called(reference)}", "implicit", stage.path, stage.section, against)


def _contrastive(run: RunFolder, stages: Sequence[_Trained]) -> Iterator[Ranker]:
    for stage in stages:
        if Role.TEACHER in stage.models and Role.REVERSE_TEACHER in stage.models:
            teacher, reverse = stage.models[Role.TEACHER], stage.models[Role.REVERSE_TEACHER]
            section = stage.section.model_copy(update={"path": _located(run, teacher, stage)})
            against = _located(run, reverse, stage)
            yield Ranker(f"{_called(teacher)} / {_called(reverse)}", "contrastive", section.path, section, against)
    for stage in stages:
        data = stage.trained_as["data"]
        turned = {**stage.trained_as, "data": data | {"reverse_preferences": True}}
        for other in stages:
            if not (stage.objective.is_scalar or data["reverse_preferences"]) and other.trained_as == turned:
                name = f"{stage.name} / {other.name}"
                yield Ranker(name, "contrastive", stage.path, stage.section, other.path)


def _called(path: str) -> str:
    return stage_of(path) or Path(path).name


def _located(run: RunFolder, path: str, stage: _Trained) -> str:
    """Where a model lies that a stage was trained with."""
    if (name := stage_of(path)) is None:
        return path
    folder = run.stage(name)
    done = folder.read_done()
    if done is None or not folder.final.is_dir() or done.weights != stage.inputs.get(name):
        raise UserError(
            f"{folder.final}: {stage.name} was trained with this model, and it is gone or was trained again since: "
            "`aligndistil train` on the recipe makes both anew"
        )
    return str(folder.final)
