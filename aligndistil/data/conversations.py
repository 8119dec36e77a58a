"""Token ids of prompts -> the turns that they were made from, for a model that has to be told them in its own words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from aligndistil.data.encoding import Encoder
from aligndistil.data.records import Messages, Record, Unusable
from aligndistil.data.templating import ChatTemplate

UNCUT = 2**20
"""Tokens that no text has."""
_WORDS = ("zubrintel", "quovander", "mekkulosp", "yaddophir")
"""Of no template, for finding out what a template writes between turns."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around the turns of a conversation that ends with the user's."""

    opening: str
    after_system: str | None
    """None for a conversation without a system turn."""
    after_user: str
    """Empty for a template of one turn."""
    after_assistant: str
    closing: str

    def stripped(self) -> _Frame:
        """For tokenizers that write the spaces between words themselves."""
        after_system = None if self.after_system is None else self.after_system.strip()
        pieces = (self.after_user.strip(), self.after_assistant.strip(), self.closing.lstrip())
        return _Frame(self.opening.rstrip(), after_system, *pieces)

    def turns(self, text: str) -> Messages | None:
        """None where the text is in another frame."""
        if not text.startswith(self.opening) or not text.endswith(self.closing):
            return None
        rest = text[len(self.opening) : len(text) - len(self.closing)]
        turns: Messages = []
        if self.after_system is not None:
            system, found, rest = rest.partition(self.after_system) if self.after_system else ("", "", rest)
            if not found:
                return None
            turns.append({"role": "system", "content": system})
        role, other = "user", "assistant"
        ends = {"user": self.after_user, "assistant": self.after_assistant}
        while True:
            content, found, after = rest.partition(ends[role]) if ends[role] else (rest, "", "")
            turns.append({"role": role, "content": content})
            if not found:
                return turns if role == "user" else None
            rest, role, other = after, other, role


class PromptReader:
    """Reads the prompts of one tokenizer. Without a chat template, or where there is none, a prompt is one turn."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], template_kwargs: Mapping[str, Any]
    ) -> None:
        """`template_kwargs` is the recipe's `model.chat_template_kwargs`. Raises UserError as `Encoder`."""
        self._tokenizer = tokenizer
        self._encoder = Encoder(
            tokenizer,
            stop_ids=stop_ids,
            max_prompt_length=UNCUT,
            max_response_length=UNCUT,
            template_kwargs=template_kwargs,
            checked=False,
        )
        self._frames: list[_Frame] = []
        if self._encoder.chat:
            template, words = ChatTemplate(tokenizer, template_kwargs), list(islice(self._words(), 4))
            several = ["user", "assistant", "user"]
            tries = (self._frame(template, words, roles) for roles in (several, ["system", *several], ["user"]))
            self._frames = [one for frame in tries if frame is not None for one in (frame, frame.stripped())]

    def read(self, prompts: Sequence[Sequence[int]]) -> list[Messages | None]:
        """The turns of each prompt; None where no turns give just these tokens, as where a prompt was cut."""
        texts = [self._decode(ids) for ids in prompts]
        read: list[Messages | None] = [None] * len(texts)
        tries = [[[{"role": "user", "content": text}]] for text in texts]
        if self._encoder.chat:
            tries = [[turns for frame in self._frames if (turns := frame.turns(text))] for text in texts]
        for attempt in range(max(map(len, tries), default=0)):
            open_ = [i for i in range(len(texts)) if read[i] is None and attempt < len(tries[i])]
            records = [self._record(tries[i][attempt]) for i in open_]
            for i, encoded in zip(open_, self._encoder.encode(records), strict=True):
                if not isinstance(encoded, Unusable) and list(encoded.rows[0].prompt_ids) == list(prompts[i]):
                    read[i] = tries[i][attempt]
        return read

    def _record(self, turns: Messages) -> Record:
        return Record(turns if self._encoder.chat else turns[0]["content"], ())

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _as_decoded(self, text: str) -> str:
        return self._decode(cast(Any, self._tokenizer(text, add_special_tokens=False))["input_ids"])

    def _words(self) -> Iterator[str]:
        """Words that come back as they were: made up, or where the tokenizer knows no such ones, of its vocabulary."""
        known = sorted((token for token in self._tokenizer.get_vocab() if token.isalnum()), key=len, reverse=True)
        yield from (word for word in (*_WORDS, *known) if self._as_decoded(word).strip() == word)

    def _frame(self, template: ChatTemplate, words: list[str], roles: list[str]) -> _Frame | None:
        """None where the template refuses such a conversation, or leaves out its words."""
        turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
        try:
            text = self._as_decoded(template.render(turns, None, answered=False))
        except Unusable:
            return None
        pieces = []
        for turn in turns:
            piece, found, text = text.partition(turn["content"])
            if not found:
                return None
            pieces.append(piece)
        opening, *between = pieces
        after_system = between.pop(0) if roles[0] == "system" else None
        after_user, after_assistant = between or ("", "")
        return _Frame(opening, after_system, after_user, after_assistant, text)
