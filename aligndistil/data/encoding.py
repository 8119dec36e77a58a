"""Records -> token ids: the chat template, one BOS, one EOS, the boundary between prompt and response, truncation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Row
from aligndistil.data.records import SAME, Messages, Record, Unusable, common_prefix
from aligndistil.errors import UserError


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as rows of token ids."""

    rows: tuple[Row, ...]
    """One for each response; one without response tokens when the record is a prompt alone."""
    prompt_truncated: bool
    responses_truncated: tuple[bool, ...]
    shifted: bool
    """The boundary had to be moved into the prompt, because its last tokens are others when the response follows."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    prompt: str
    wholes: tuple[str, ...]
    templated: bool


class Encoder:
    """Encodes records for one tokenizer.

    Messages go through the chat template, and so does a string prompt, as the user's turn, when there is a template.
    Without one, strings are joined as they are, after the BOS that the tokenizer adds by itself. Template text is
    tokenised without special tokens, for it writes its own.

    A whole response ends with one stop token: the one its template writes if it is in `stop_ids` (what follows, a line
    break say, is cut), else the tokenizer's EOS. A response cut to `max_response_length` has none. A prompt is cut to
    `max_prompt_length` at its beginning; its BOS stays.

    Raises UserError when the tokenizer has neither EOS nor stop ids, or the template does not parse.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: frozenset[int],
        max_prompt_length: int = 1024,
        max_response_length: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template
        self.max_prompt_length, self.max_response_length = max_prompt_length, max_response_length
        eos, self._bos = cast("int | None", tokenizer.eos_token_id), cast("int | None", tokenizer.bos_token_id)
        self.stop_ids = stop_ids | ({eos} if eos is not None else set())
        if not self.stop_ids:
            raise UserError("the tokenizer has no EOS token and the model no stop ids: no response could end; set one")
        self._eos = eos if eos is not None else min(self.stop_ids)
        self._adds_bos = self._bos is not None and tokenizer("")["input_ids"][:1] == [self._bos]
        self._is_blank: dict[int, bool] = {}

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self.template is not None

    def fingerprint(self) -> str:
        """SHA-256 of everything here that token ids depend on."""
        if self.tokenizer.is_fast:
            # The tokenizer itself, whatever files it came from; padding and truncation are call options, not content.
            whole = json.loads(cast(Any, self.tokenizer).backend_tokenizer.to_str())
            backend: Any = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
        else:
            backend = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        state = [backend, str(self.template), sorted(self.stop_ids), self._eos, self._bos, self._adds_bos]
        lengths = [self.max_prompt_length, self.max_response_length]
        return hashlib.sha256(json.dumps([*state, *lengths]).encode()).hexdigest()

    def encode(self, records: Sequence[Record]) -> list[Encoded | Unusable]:
        """The records in order; an Unusable stands where one has to be dropped. Large lists are much faster."""
        rendered = [self._try_render(record) for record in records]
        texts = [text for one in rendered if isinstance(one, _Rendered) for text in (one.prompt, *one.wholes)]
        tokenised = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        ids = iter(cast("list[list[int]]", tokenised))
        encoded: list[Encoded | Unusable] = []
        for one, record in zip(rendered, records, strict=True):
            if isinstance(one, Unusable):
                encoded.append(one)
                continue
            prompt = self._lead(next(ids), one)
            wholes = [self._lead(next(ids), one) for _ in one.wholes]
            encoded.append(self._assemble(prompt, wholes, record))
        return encoded

    def _try_render(self, record: Record) -> _Rendered | Unusable:
        try:
            return self._render(record)
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        except TemplateError as error:
            return Unusable(f"the chat template refuses the conversation: {error}")

    def _render(self, record: Record) -> _Rendered:
        prompt = record.prompt
        if not self.chat:
            if not isinstance(prompt, str):
                raise UserError("the rows are messages and the tokenizer has no chat template: set model.chat_template")
            return _Rendered(prompt, tuple(prompt + response for response in record.responses), templated=False)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        wholes = (
            self._apply([*messages, {"role": "assistant", "content": response}], answered=True)
            for response in record.responses
        )
        return _Rendered(self._apply(messages, answered=False), tuple(wholes), templated=True)

    def _apply(self, messages: Messages, *, answered: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        return cast(str, text)

    def _lead(self, ids: list[int], rendered: _Rendered) -> list[int]:
        """One BOS at most: added to plain text where the tokenizer would, never to what a template wrote."""
        if self._bos is None:
            return ids
        if not rendered.templated:
            rest = list(takewhile(lambda token: token == self._bos, ids))
            return ([self._bos] if self._adds_bos or rest else []) + ids[len(rest) :]
        if ids[:2] == [self._bos, self._bos]:
            raise UserError(
                f"two BOS tokens open the row {rendered.prompt[:60]!r}: both its text and the chat template write one; "
                "take it out of either"
            )
        return ids

    def _assemble(self, prompt: list[int], wholes: list[list[int]], record: Record) -> Encoded | Unusable:
        # One boundary for both halves of a pair, so that they are conditioned on the same prompt.
        boundary = min((common_prefix(prompt, whole) for whole in wholes), default=len(prompt))
        kept = self._cut_prompt(prompt[:boundary])
        if not kept:
            return Unusable("empty prompt")
        if not wholes:
            return Encoded((Row(kept, []),), boundary > len(kept), (), shifted=False)
        responses = [self._end(whole[boundary:]) for whole in wholes]
        if not all(responses):
            return Unusable("empty response")
        cut = [response[: self.max_response_length] for response in responses]
        if len(cut) == 2 and cut[0] == cut[1]:
            return Unusable(SAME if responses[0] == responses[1] else f"{SAME} after truncation")
        return Encoded(
            rows=tuple(Row(kept, response, record.label) for response in cut),
            prompt_truncated=boundary > len(kept),
            responses_truncated=tuple(len(a) > len(b) for a, b in zip(responses, cut, strict=True)),
            shifted=boundary < len(prompt),
        )

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_prompt_length:
            return ids
        keeps_bos = ids[0] == self._bos and self.max_prompt_length > 1
        return ids[:keeps_bos] + ids[len(ids) - self.max_prompt_length + keeps_bos :]

    def _end(self, response: list[int]) -> list[int]:
        """The response with one stop token at its end, or nothing when it has no other token."""
        end = len(response)
        first_stop = None
        while end > 0 and (response[end - 1] in self.stop_ids or self._blank(response[end - 1])):
            end -= 1
            first_stop = end if response[end] in self.stop_ids else first_stop
        body = response if first_stop is None else response[:first_stop]
        stop = self._eos if first_stop is None else response[first_stop]
        return [*body, stop] if body else []

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not cast(str, self.tokenizer.decode([token])).strip()
        return self._is_blank[token]
