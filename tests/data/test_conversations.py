"""Prompts as token ids, read back into the turns that they were made of."""

from __future__ import annotations

from typing import Any

import pytest

from aligndistil.data import Encoder, PromptReader, Record
from support.chat_templates import FAMILIES
from support.models import build_tokenizer

ASKED = [{"role": "user", "content": "What is it?\n\n  - this\n  - that"}]
SYSTEM = {"role": "system", "content": "Be brief: no <tags>."}
LONG = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hello. You?"},
    {"role": "user", "content": "Fine"},
    {"role": "assistant", "content": "Good"},
    {"role": "user", "content": "And now"},
]


def prompts_of(family: str, conversations: list[Any], **lengths: Any) -> tuple[list[list[int]], PromptReader]:
    """Token ids of the prompts, and what reads them back."""
    chosen = FAMILIES[family]
    tokenizer = chosen.tokenizer()
    given = chosen.encoder(checked=False, **lengths).encode([Record(turns, ()) for turns in conversations])
    stops = frozenset(map(tokenizer.convert_tokens_to_ids, chosen.stops))
    return [list(one.rows[0].prompt_ids) for one in given], PromptReader(tokenizer, stops, {})  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_turns_of_a_prompt_are_those_that_it_was_made_of(family: str) -> None:
    given = [ASKED, LONG, [SYSTEM, *ASKED], [SYSTEM, *LONG]][: 2 if family == "mistral" else 4]
    into_user = family == "gemma3"  # the system turn is written into the user's, and is read there
    prompts, reader = prompts_of(family, given)
    for turns, back in zip(given, reader.read(prompts), strict=True):
        assert back is not None
        kept = turns[1:] if into_user and turns[0]["role"] == "system" else turns
        assert [turn["role"] for turn in back] == [turn["role"] for turn in kept]
        assert all(said["content"] in read["content"] for said, read in zip(kept, back, strict=True))
        if not into_user:
            assert back == turns


def test_a_prompt_that_was_cut_or_is_of_no_template_is_not_read() -> None:
    long = [{"role": "user", "content": "word " * 40}]
    prompts, reader = prompts_of("qwen2.5", [ASKED, long], max_prompt_length=90)
    again, _ = prompts_of("llama3", [ASKED])
    read = reader.read([*prompts, again[0], [5, 6, 7]])
    assert [one is not None for one in read] == [True, False, False, False]


def test_a_tokenizer_that_knows_no_other_words_than_its_own() -> None:
    tokenizer = build_tokenizer()
    given = ["w01 w02", [{"role": "user", "content": "w03"}]]
    encoder = Encoder(tokenizer, stop_ids=frozenset({1}), checked=False)
    prompts = [list(one.rows[0].prompt_ids) for one in encoder.encode([Record(one, ()) for one in given])]  # type: ignore[arg-type, union-attr]
    read = PromptReader(tokenizer, frozenset({1}), {}).read(prompts)
    assert read == [[{"role": "user", "content": "w01 w02"}], [{"role": "user", "content": "w03"}]]


def test_without_a_chat_template_a_prompt_is_one_turn() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    read = PromptReader(tokenizer, frozenset({1}), {}).read([[5, 6, 7]])
    assert read == [[{"role": "user", "content": "w00 w01 w02"}]]


def test_a_template_of_one_turn() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "<user> {{ messages[-1].content }} <bot>"
    read = PromptReader(tokenizer, frozenset({1}), {}).read([[3, 6, 7, 4], [3, 6]])
    assert read == [[{"role": "user", "content": "w01 w02"}], None]
