"""A reward model of another tokenizer than the policy's, which reads the same conversation in its own tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aligndistil import recipe
from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.data import Encoder, PromptReader, Record
from aligndistil.data.conversations import UNCUT
from aligndistil.data.records import Messages, Unusable
from aligndistil.engine.scalar import Scorer
from aligndistil.errors import UserError
from aligndistil.models import load_tokenizer, positions, stop_ids


class TextReader:
    """What stands between the policy's tokens and a reward model: text, the reward's own chat template and tokenizer.

    A response is what the policy said without special tokens; the reward's template or end of sequence ends it, also
    where it was cut.
    """

    def __init__(self, path: str, folder: str, section: recipe.Model, policy: PromptReader) -> None:
        """`path` is what the recipe calls the reward model, `folder` where it lies, `section` how it is loaded."""
        own = section.model_copy(update={"path": folder, "chat_template": None, "chat_template_kwargs": {}})
        self.path, self._policy = path, policy
        self._tokenizer = load_tokenizer(folder, own)
        stops = stop_ids(folder, own, self._tokenizer)
        self._positions = positions(folder, own)
        self._encoder = Encoder(
            self._tokenizer, stop_ids=stops, max_prompt_length=UNCUT, max_response_length=UNCUT, checked=False
        )

    def check(self, prompts: Iterable[Sequence[int]]) -> None:
        """Raises UserError where some of the policy's prompts cannot be told to the reward model."""
        distinct = list({tuple(prompt): None for prompt in prompts})
        self._rows(self._policy.read(distinct), [""] * len(distinct))

    def rows(self, prompts: Sequence[Sequence[int]], responses: Sequence[str]) -> list[Row]:
        """What the reward model reads of each, in its own tokens. Raises UserError as `check`."""
        return self._rows(self._policy.read(prompts), responses)

    def collated(self, rows: Sequence[Row]) -> Batch:
        return collate(rows, DataKind.RESPONSES, self._tokenizer.pad_token_id)

    def _rows(self, conversations: Sequence[Messages | None], responses: Sequence[str]) -> list[Row]:
        known = [turns for turns in conversations if turns is not None]
        if len(known) < len(conversations):
            raise UserError(
                f"the reward model {self.path} has another tokenizer than the policy and reads conversations as text; "
                f"{len(conversations) - len(known)} of {len(conversations)} prompts cannot be turned back into one "
                "(cut by data.max_prompt_length, or not of its chat template): set data.overlong_prompts: drop, or "
                "score with python:MODULE:FUNCTION"
            )
        if not self._encoder.chat and any(len(turns) > 1 for turns in known):
            raise UserError(
                f"the reward model {self.path} has no chat template, and the prompts are conversations; give one that "
                "has, or score with python:MODULE:FUNCTION"
            )
        prompts = known if self._encoder.chat else [turns[0]["content"] for turns in known]
        records = [
            Record(prompt, (response,) if response.strip() else ())
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        rows = []
        for record, encoded in zip(records, self._encoder.encode(records), strict=True):
            if isinstance(encoded, Unusable):
                raise UserError(
                    f"the reward model {self.path} cannot read {str(record.prompt)[:60]!r}: {encoded}; give another "
                    "reward model, or score with python:MODULE:FUNCTION"
                )
            [row] = encoded.rows
            # A response of nothing is its end alone.
            rows.append(row if row.response_ids else Row(row.prompt_ids, [self._tokenizer.eos_token_id]))
        longest = max((len(row.prompt_ids) + len(row.response_ids) for row in rows), default=0)
        if self._positions is not None and self._positions.fixed and longest > self._positions.count:
            raise UserError(
                f"the reward model {self.path} has {self._positions.count} positions, and the longest text needs "
                f"{longest} of its tokens; lower data.max_prompt_length or the longest response, or give another"
            )
        return rows


class TextReward:
    """Scores responses with a model of another tokenizer, at the last token of each."""

    def __init__(self, model: Scorer, reader: TextReader, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` is the policy's."""
        self._model, self._reader, self._tokenizer = model, reader, tokenizer

    def scores(self, batch: Batch) -> Tensor:
        """(B, T) float32, zero but at the last response token. Raises UserError when a prompt is no conversation."""
        prompt_ids, response_ids = ids_of(batch)
        responses = self._tokenizer.batch_decode(response_ids, skip_special_tokens=True)
        theirs = self._reader.collated(self._reader.rows(prompt_ids, responses)).to(batch.ids_BT.device)
        scores = self._model.scores(theirs).gather(1, theirs.attention_BT.sum(-1, keepdim=True) - 1)
        return at_last_token(batch, scores.squeeze(-1))


def ids_of(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and response of each row."""
    ids_BT, response_BT = batch.ids_BT.cpu(), batch.response_BT.cpu()
    prompt_BT = batch.attention_BT.cpu() & ~response_BT
    prompts = [ids[mask].tolist() for ids, mask in zip(ids_BT, prompt_BT, strict=True)]
    return prompts, [ids[mask].tolist() for ids, mask in zip(ids_BT, response_BT, strict=True)]


def at_last_token(batch: Batch, scores_B: Tensor) -> Tensor:
    """(B, T) the score of each row at its last response token, zero elsewhere."""
    positions = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
    last = (positions * batch.response_BT).amax(-1, keepdim=True)
    return torch.zeros(batch.ids_BT.shape, device=scores_B.device).scatter(1, last, scores_B[:, None])
