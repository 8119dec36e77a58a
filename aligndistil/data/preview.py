"""Rows as coloured text, in which a wrong boundary between prompt and response is seen at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Row
from aligndistil.errors import printable

PROMPT_STYLE, RESPONSE_STYLE, BOUNDARY_STYLE = "cyan", "green", "bold red"
BETWEEN_TOKENS, BOUNDARY, LINE_BREAK = "|", "‖", "↵\n"


def preview(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int] = frozenset(),
    labels: Sequence[str] = (),
) -> list[Text]:
    """A header and the tokens of each row: prompt and response in two colours, `|` between tokens, `‖` at the boundary.

    A response is shown as truncated when it does not end with one of `stop_ids` or the tokenizer's EOS. `labels` opens
    the headers: one for each row ("chosen", "rejected", "undesirable", or "" for none). Characters that a terminal
    obeys or does not show are escaped. Raises ValueError when there are labels, and not as many as rows.
    """
    stops = {*stop_ids, tokenizer.eos_token_id}
    named = zip(rows, labels or [""] * len(rows), strict=True)
    return [_show(row, label, tokenizer, stops) for row, label in named]


def _show(row: Row, label: str, tokenizer: PreTrainedTokenizerBase, stops: Collection[object]) -> Text:
    prompt, response = list(row.prompt_ids), list(row.response_ids)
    ending = "no response" if not response else "EOS" if response[-1] in stops else "truncated: no EOS"
    text = Text(overflow="fold")
    text.append(f"{label}: " if label else "", "bold")
    text.append(f"prompt {len(prompt)} tokens, response {len(response)} tokens, {ending}\n")
    _append(text, prompt, tokenizer, PROMPT_STYLE)
    text.append(BOUNDARY, BOUNDARY_STYLE)
    _append(text, response, tokenizer, RESPONSE_STYLE)
    return text


def _append(text: Text, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, style: str) -> None:
    for place, token in enumerate(ids):
        if place:
            text.append(BETWEEN_TOKENS, "dim")
        text.append("".join(map(_visible, _piece(token, tokenizer))), style)


def _piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token's text. SentencePiece decoders drop the space a lone token begins with, so it is put back."""
    raw = cast(str, tokenizer.convert_ids_to_tokens(token))
    return raw.replace("▁", " ") if "▁" in raw else cast(str, tokenizer.decode([token]))


def _visible(character: str) -> str:
    if character == "\n":
        return LINE_BREAK
    return printable(character)
