"""Which responses are looked at: the policy's own, or those of the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind, Row
from aligndistil.data import Encoder, Examples, Record, gives, load_examples
from aligndistil.data.records import Unusable
from aligndistil.errors import UserError
from aligndistil.rollout import LoadedModel, SamplingParams, sample_seed
from aligndistil.token_view.trained import TrainedStage

SHOWN = 4
"""Prompts of the evaluation data that the policy answers when nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the page is to show; with neither prompts nor rows, the policy's answers to the first evaluation prompts."""

    prompts: Sequence[str] = ()
    """The policy answers them."""
    rows: Sequence[int] = ()
    """Numbers, from 1, of the evaluation data: their own responses are shown, a pair's both."""
    seed: int = 0
    max_new_tokens: int | None = None
    """None is what the stage was trained with."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response to look at."""

    label: str
    row: Row
    finished: bool
    """False when the response was cut before a stop token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the policy is to answer."""

    label: str
    ids: Sequence[int]
    seed: int


def choose(
    stage: TrainedStage, request: Request, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> list[Prompt | Response]:
    """What `request` names, prompts first, before any weight is read.

    Raises UserError when a prompt or row cannot be shown.
    """
    chosen: list[Prompt | Response] = []
    encoder = Encoder(
        tokenizer,
        stop_ids=stop_ids,
        max_prompt_length=stage.data.max_prompt_length,
        template_kwargs=stage.model.chat_template_kwargs,
        overlong_prompts=stage.data.overlong_prompts,
    )
    for k, encoded in enumerate(encoder.encode([Record(prompt, ()) for prompt in request.prompts])):
        if isinstance(encoded, Unusable):
            raise UserError(f"--prompt {request.prompts[k]!r}: {encoded}; give another")
        seed = sample_seed(request.seed, "inspect", request.prompts[k], k)
        chosen.append(Prompt(f"prompt {k + 1}", encoded.rows[0].prompt_ids, seed))

    def to_answer(number: int, ids: Sequence[int]) -> Prompt:
        return Prompt(f"answer to row {number}", ids, sample_seed(request.seed, "inspect", "row", number))

    data = _EvalData(stage, tokenizer, stop_ids)
    for number in request.rows:
        rows = data.rows(number)
        labels = ("chosen", "rejected") if len(rows) == 2 else ("" if rows[0].label else "undesirable",)
        for row, label in zip(rows, labels, strict=True):
            if row.response_ids:
                finished = row.response_ids[-1] in stop_ids
                chosen.append(Response(f"row {number} {label}".strip(), row, finished))
            else:
                chosen.append(to_answer(number, row.prompt_ids))
    return chosen or [to_answer(number, ids) for number, ids in enumerate(data.prompts(SHOWN), 1)]


def answer(
    stage: TrainedStage, chosen: Sequence[Prompt | Response], max_new_tokens: int | None, policy: LoadedModel
) -> list[Response]:
    """`chosen` with answers, drawn as the stage drew its own samples, or from the policy itself where it drew none."""
    section = stage.rollout
    longest = section.max_new_tokens if section else stage.data.max_response_length
    temperature, top_p = (section.temperature, section.top_p) if section else (1.0, 1.0)
    params = SamplingParams(max_new_tokens or longest, temperature, top_p)
    prompts = [one for one in chosen if isinstance(one, Prompt)]
    samples = policy.sample([prompt.ids for prompt in prompts], params, [prompt.seed for prompt in prompts])
    answers = (
        Response(prompt.label, Row(prompt.ids, sample.token_ids), sample.finished)
        for prompt, sample in zip(prompts, samples, strict=True)
    )
    return [next(answers) if isinstance(one, Prompt) else one for one in chosen]


class _EvalData:
    """The evaluation data, read when it is first needed, with preferences the right way round."""

    def __init__(self, stage: TrainedStage, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        self._stage, self._tokenizer, self._stop_ids = stage, tokenizer, stop_ids
        self._read: dict[DataKind, Examples] = {}

    def rows(self, number: int) -> list[Row]:
        """Chosen and rejected where there are pairs, else a response, else a prompt alone."""
        kinds = (DataKind.PAIRS, DataKind.UNPAIRED, DataKind.RESPONSES, DataKind.PROMPTS)
        self._refuse_missing("--row")
        kind = next(kind for kind in kinds if gives(self._stage.data, "eval", kind))
        examples = self._examples(kind)
        if not 1 <= number <= len(examples):
            raise UserError(f"--row {number}: the evaluation data has rows 1 to {len(examples)}; give one of them")
        return examples.rows(number - 1)

    def prompts(self, count: int) -> list[list[int]]:
        self._refuse_missing("--prompt")
        examples = self._examples(DataKind.PROMPTS)
        return [examples.prompt_ids(i) for i in range(min(count, len(examples)))]

    def _refuse_missing(self, option: str) -> None:
        if self._stage.data.eval is None:
            reason = "--row reads it" if option == "--row" else "nothing else says what to show"
            raise UserError(f"{self._stage.folder}: the stage has no data.eval, and {reason}: give --prompt TEXT")

    def _examples(self, kind: DataKind) -> Examples:
        if kind not in self._read:
            section = self._stage.data.model_copy(update={"reverse_preferences": False})
            self._read[kind] = load_examples(
                section,
                "eval",
                kind,
                self._tokenizer,
                self._stop_ids,
                template_kwargs=self._stage.model.chat_template_kwargs,
                seed=self._stage.seed,
            )
        return self._read[kind]
