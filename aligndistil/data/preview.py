"""Rows as coloured text, in which a wrong boundary between prompt and response is seen at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Row

PROMPT_STYLE, RESPONSE_STYLE, BOUNDARY_STYLE = "cyan", "green", "bold red"
BETWEEN_TOKENS, BOUNDARY, LINE_BREAK = "|", "‖", "↵\n"


def preview(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = frozenset()
) -> list[Text]:
    """A header and the tokens of each row: prompt and response in two colours, `|` between tokens, `‖` at the boundary.

    A response is shown as truncated when it does not end with one of `stop_ids` or the tokenizer's EOS.
    """
    return [_show(row, tokenizer, {*stop_ids, tokenizer.eos_token_id}) for row in rows]


def _show(row: Row, tokenizer: PreTrainedTokenizerBase, stops: Collection[object]) -> Text:
    prompt, response = list(row.prompt_ids), list(row.response_ids)
    ending = "no response" if not response else "EOS" if response[-1] in stops else "truncated: no EOS"
    text = Text(f"prompt {len(prompt)} tokens, response {len(response)} tokens, {ending}\n", style="")
    _append(text, prompt, tokenizer, PROMPT_STYLE)
    text.append(BOUNDARY, BOUNDARY_STYLE)
    _append(text, response, tokenizer, RESPONSE_STYLE)
    return text


def _append(text: Text, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, style: str) -> None:
    for place, token in enumerate(ids):
        if place:
            text.append(BETWEEN_TOKENS, "dim")
        text.append(_piece(token, tokenizer).replace("\n", LINE_BREAK), style)


def _piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token's text. SentencePiece decoders drop the space a lone token begins with, so it is put back."""
    raw = cast(str, tokenizer.convert_ids_to_tokens(token))
    return raw.replace("▁", " ") if "▁" in raw else cast(str, tokenizer.decode([token]))
