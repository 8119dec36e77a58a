"""Records -> token ids: the chat template, one BOS, one EOS, the boundary between prompt and response, truncation."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Row
from aligndistil.data.records import SAME, Messages, Record, Unusable, common_prefix
from aligndistil.data.templating import FIXED_DATE, REPEATED, ChatTemplate, repeats
from aligndistil.errors import UserError

OVERLONG = "the prompt has more than max_prompt_length tokens"
OVERLONG_SYSTEM = "the system turn has max_prompt_length tokens or more: of the prompt, nothing would be left"
NOT_FINAL = "the row is messages, and its source says `templated: true`: final text is text"
_PATHS = ("_file", "name_or_path", "chat_template", "auto_map")
"""How options of a tokenizer end that are paths, or are told apart elsewhere."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})


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
    by_template: bool


class Encoder:
    """Encodes records for one tokenizer.

    Messages go through the chat template, and so does a string prompt, as the user's turn, when there is a template.
    Without one, and where the record says that it is templated, strings are joined as they are, after the BOS that the
    tokenizer adds by itself. Template text is tokenised without special tokens, for it writes its own. A template that
    writes the date is told FIXED_DATE.

    A record is Unusable when the template does not write what it says (`templating.TEMPLATE_REASONS`), or an answer
    begins with its prompt; `checked=False` takes it as the template writes it: what a model has said is no user's
    mistake.

    A whole response ends with one stop token: the one its template writes if it is in `stop_ids` (what follows, a line
    break say, is cut), else the tokenizer's EOS. A response cut to `max_response_length` has none. A longer prompt than
    `max_prompt_length` is Unusable (`overlong_prompts="drop"`), or loses tokens after its system turn (`"keep_end"`):
    its BOS, its system turn and its end stay.

    Raises UserError when the tokenizer has neither EOS nor stop ids, the template does not parse, or `template_kwargs`
    (the recipe's model.chat_template_kwargs) has what the template cannot be given or does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: frozenset[int],
        max_prompt_length: int = 1024,
        max_response_length: int = 1024,
        template_kwargs: Mapping[str, Any] = _NOTHING,
        overlong_prompts: Literal["keep_end", "drop"] = "keep_end",
        checked: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_length, self.max_response_length = max_prompt_length, max_response_length
        eos, self._bos = cast("int | None", tokenizer.eos_token_id), cast("int | None", tokenizer.bos_token_id)
        self.stop_ids = stop_ids | ({eos} if eos is not None else set())
        if not self.stop_ids:
            raise UserError("the tokenizer has no EOS token and the model no stop ids: no response could end; set one")
        self._eos = eos if eos is not None else min(self.stop_ids)
        self._adds_bos = self._bos is not None and tokenizer("")["input_ids"][:1] == [self._bos]
        self._splitting = _splitting_tokens(tokenizer)
        self._is_blank: dict[int, bool] = {}
        self._template_kwargs, self._overlong_prompts, self._checked = dict(template_kwargs), overlong_prompts, checked
        self._template = ChatTemplate(tokenizer, template_kwargs) if tokenizer.chat_template is not None else None
        if self._template is None and template_kwargs:
            raise UserError("model.chat_template_kwargs: the tokenizer has no chat template to give them to")

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def mode(self) -> str | None:
        """A line about whether prompts and answers are those of a model that thinks; None where it is no question."""
        return None if self._template is None else self._template.mode()

    def fingerprint(self) -> str:
        """SHA-256 of everything here that token ids depend on."""
        if self.tokenizer.is_fast:
            # The tokenizer itself, whatever files it came from; padding and truncation are call options, not content.
            whole = json.loads(cast(Any, self.tokenizer).backend_tokenizer.to_str())
            backend: Any = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
        else:
            backend = [_source_of(type(self.tokenizer)), sorted(self.tokenizer.get_vocab().items())]
        # Options, and not the paths that it came from: the same tokenizer in another folder is the same.
        options = {key: value for key, value in self.tokenizer.init_kwargs.items() if not key.endswith(_PATHS)}
        names = [self.tokenizer.special_tokens_map, getattr(self.tokenizer, "split_special_tokens", False)]
        tokens = [backend, options, names, sorted(self.stop_ids), self._eos, self._bos, self._adds_bos]
        template = [str(self.tokenizer.chat_template), sorted(self._template_kwargs.items()), FIXED_DATE.isoformat()]
        lengths = [self.max_prompt_length, self.max_response_length, self._overlong_prompts, self._checked]
        return hashlib.sha256(json.dumps([tokens, template, lengths], sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, records: Sequence[Record]) -> list[Encoded | Unusable]:
        """The records in order; an Unusable stands where one has to be dropped. Large lists are much faster.

        Raises UserError when a record is messages and there is no chat template, or the template writes two BOS.
        """
        rendered = [self._try_render(record) for record in records]
        texts = [text for one in rendered if isinstance(one, _Rendered) for text in self._parts(one)]
        ids = iter(self._tokenise(texts))
        encoded: list[Encoded | Unusable] = []
        for one, record in zip(rendered, records, strict=True):
            if isinstance(one, Unusable):
                encoded.append(one)
                continue
            shared = next(ids)
            prompt, *wholes = (self._lead(shared + next(ids), one) for _ in (one.prompt, *one.wholes))
            try:
                encoded.append(self._assemble(prompt, wholes, record, one.by_template))
            except Unusable as reason:
                encoded.append(reason)
        return encoded

    def _parts(self, one: _Rendered) -> list[str]:
        """What the prompt and the wholes share up to the last token that splits them all, and what each has after it.

        Nothing before such a token has a part in the ids after it, so a long prompt need not be tokenised three times.
        """
        cut, end = max(((one.prompt.rfind(token), len(token)) for token in self._splitting), default=(0, 0))
        if cut <= 0 or not all(whole.startswith(one.prompt[: cut + end]) for whole in one.wholes):
            cut = 0
        return [one.prompt[:cut], one.prompt[cut:], *(whole[cut:] for whole in one.wholes)]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return cast("list[list[int]]", self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def _try_render(self, record: Record) -> _Rendered | Unusable:
        try:
            if self._checked and any(repeats(record.prompt, response) for response in record.responses):
                raise Unusable(REPEATED)
            return self._plain(record) if self._template is None or record.templated else self._render(record)
        except Unusable as reason:
            return reason

    def _plain(self, record: Record) -> _Rendered:
        prompt, responses = record.prompt, [one for one in record.responses if isinstance(one, str)]
        if isinstance(prompt, str) and len(responses) == len(record.responses) and not record.tools:
            return _Rendered(prompt, tuple(prompt + response for response in responses), by_template=False)
        if self._template is not None:
            raise Unusable(NOT_FINAL)
        raise UserError("the rows are messages and the tokenizer has no chat template: set model.chat_template")

    def _render(self, record: Record) -> _Rendered:
        template, messages = cast(ChatTemplate, self._template), _messages(record.prompt)
        answers = [{"role": "assistant", "content": one} if isinstance(one, str) else one for one in record.responses]
        if not self._checked:
            prompt = template.render(messages, record.tools, answered=False)
            wholes = [template.render([*messages, answer], record.tools, answered=True) for answer in answers]
        else:
            prompt = template.prompt(messages, record.tools)
            wholes = [template.whole(messages, answer, record.tools, prompt) for answer in answers]
        return _Rendered(prompt, tuple(wholes), by_template=True)

    def _lead(self, ids: list[int], rendered: _Rendered) -> list[int]:
        """One BOS at most: added to plain text where the tokenizer would, never to what a template wrote."""
        if self._bos is None:
            return ids
        if not rendered.by_template:
            rest = list(takewhile(lambda token: token == self._bos, ids))
            return ([self._bos] if self._adds_bos or rest else []) + ids[len(rest) :]
        if ids[:2] == [self._bos, self._bos]:
            raise UserError(f"the chat template opens the row {rendered.prompt[:60]!r} with two BOS tokens; mend it")
        return ids

    def _assemble(
        self, prompt: list[int], wholes: list[list[int]], record: Record, by_template: bool
    ) -> Encoded | Unusable:
        # One boundary for both halves of a pair, so that they are conditioned on the same prompt.
        boundary = min((common_prefix(prompt, whole) for whole in wholes), default=len(prompt))
        kept = prompt[:boundary]
        if boundary > self.max_prompt_length:
            kept = self._cut_prompt(kept, record if by_template else None)
        if not kept:
            return Unusable("empty prompt")
        if not wholes:
            return Encoded((Row(kept, []),), boundary > len(kept), (), shifted=False)
        responses = [self._end(whole[boundary:]) for whole in wholes]
        if by_template:
            responses = [self._ended(ids, said) for ids, said in zip(responses, record.responses, strict=True)]
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

    def _cut_prompt(self, ids: list[int], record: Record | None) -> list[int]:
        """`max_prompt_length` of the ids; `record` is what the template wrote them from."""
        if self._overlong_prompts == "drop":
            raise Unusable(OVERLONG)
        opening = int(ids[0] == self._bos and self.max_prompt_length > 1)
        system = 0 if record is None else self._system_turn(ids, record)
        if system and system >= self.max_prompt_length:
            raise Unusable(OVERLONG_SYSTEM)
        kept = max(opening, system)
        return ids[:kept] + ids[len(ids) - self.max_prompt_length + kept :]

    def _system_turn(self, ids: list[int], record: Record) -> int:
        """How many of a prompt's first ids are its system turn, the row's or the template's own; 0 without one."""
        turns = list(takewhile(lambda turn: turn["role"] in ("system", "developer"), _messages(record.prompt)))
        if turns:
            shared, whole = self._shared(ids, turns, record)
            if whole:
                return shared
        # A template that writes it into the user's turn, or one of its own: up to the end of its turn, if it has one.
        shared, whole = self._shared(ids, [*turns, {"role": "user", "content": "?"}], record)
        ends = [place for place, token in enumerate(ids[:shared], start=1) if token in self.stop_ids]
        if not ends:
            return shared if turns and whole else 0
        return ends[-1] + sum(1 for _ in takewhile(self._blank, ids[ends[-1] : shared]))

    def _shared(self, ids: list[int], turns: Messages, record: Record) -> tuple[int, bool]:
        """How many ids are shared with these turns alone, and whether the template writes all of their content."""
        try:
            text = cast(ChatTemplate, self._template).render(turns, record.tools, answered=True)
        except Unusable:
            return 0, False
        [alone] = self._tokenise([text])
        return common_prefix(ids, alone), all(turn["content"].strip() in text for turn in turns)

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

    def _ended(self, response: list[int], said: str | dict[str, Any]) -> list[int]:
        """The response without what a template writes after the stop token that ends the answer."""
        content = said if isinstance(said, str) else str(said.get("content") or "")
        first = next((place for place, token in enumerate(response[:-1]) if token in self.stop_ids), None)
        if first is None or not content.strip():
            return response
        text = cast(str, self.tokenizer.decode(response[:first]))
        return response[: first + 1] if content.strip() in text else response

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not cast(str, self.tokenizer.decode([token])).strip()
        return self._is_blank[token]


def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # compiled, say
        return kind.__qualname__


def _splitting_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Added tokens that a tokenizer finds before all else, whatever stands before or after them."""
    if not tokenizer.is_fast:
        return []
    added = tokenizer.added_tokens_decoder.values()
    others = [str(token) for token in added]

    def alone(token: str) -> bool:
        """Whether it can be found nowhere else than in its place: no token, itself too, ends as it begins."""
        begins = tuple(token[:length] for length in range(1, len(token)))
        return not any((token in other and token != other) or other.endswith(begins) for other in others)

    return [str(one) for one in added if alone(str(one)) and not (one.normalized or one.lstrip or one.single_word)]


def _messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
