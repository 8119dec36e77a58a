"""Tokens as text that a reader can tell apart: white space kept, half characters and special tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

_CONTEXT = 3
"""Tokens before one that are decoded with it: enough for a character of four bytes and for a leading space."""
_UNDECODABLE = "\ufffd"


class Kind(IntEnum):
    """What a token's text is."""

    TEXT = 0
    SPECIAL = 1
    """A control token, such as the one that ends a response."""
    BYTES = 2
    """Part of a character: the text is the vocabulary's own spelling of it."""


class TokenText(NamedTuple):
    """A token to show."""

    text: str
    kind: Kind


class TokenDecoder:
    """Decodes the tokens of one tokenizer one by one, for a reader."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}

    def sequence(self, ids: Sequence[int]) -> list[TokenText]:
        """Tokens as they read one after the other."""
        return [self._in_context(ids[max(0, t - _CONTEXT) : t], ids[t]) for t in range(len(ids))]

    def alone(self, token: int) -> TokenText:
        """A token by itself; a space that it begins with is shown even where a decoder drops it."""
        text, kind = shown = self._in_context((), token)
        piece = self._piece(token)
        starts_word = piece.startswith("▁") and not text.startswith(" ")
        return TokenText(f" {text}", kind) if starts_word and kind is Kind.TEXT else shown

    def _in_context(self, before: Sequence[int], token: int) -> TokenText:
        if token in self._special:
            return TokenText(self._piece(token), Kind.SPECIAL)
        start, whole = self._decode(before), self._decode([*before, token])
        text = whole[len(start) :] if whole.startswith(start) else self._decode([token])
        if not text or _UNDECODABLE in text:
            return TokenText(self._piece(token), Kind.BYTES)
        return TokenText(text, Kind.TEXT)

    def _decode(self, ids: Sequence[int]) -> str:
        return cast(str, self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _piece(self, token: int) -> str:
        piece = cast("str | None", self._tokenizer.convert_ids_to_tokens(token))
        return f"#{token}" if piece is None else piece
