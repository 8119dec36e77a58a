"""Tokens are shown so that their texts can be told apart and read on."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aligndistil.models import load_tokenizer
from aligndistil.recipe import Model
from aligndistil.token_view.texts import Kind, TokenDecoder


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A byte-level tokenizer, as GPT-2, Llama 3, Qwen and SmolLM have."""
    return load_tokenizer("builtin:tiny", Model(path="builtin:tiny"))


@pytest.fixture(scope="module")
def sentencewise() -> Any:
    """As Llama 2 and Gemma: a word begins with a mark, which the decoder drops at the beginning of a text."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁good": 1, "ness": 2}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_texts_read_one_after_the_other(bytewise: Any) -> None:
    text = "The plot soars.\n\nI loved  it"
    shown = TokenDecoder(bytewise).sequence(bytewise(text, add_special_tokens=False)["input_ids"])
    assert "".join(one.text for one in shown) == text
    assert shown[1].text == " plot"
    assert {one.kind for one in shown} == {Kind.TEXT}


def test_parts_of_a_character_show_the_vocabularys_spelling(bytewise: Any) -> None:
    ids = bytewise("a😀b", add_special_tokens=False)["input_ids"]
    shown = TokenDecoder(bytewise).sequence(ids)
    assert [one.kind for one in shown] == [Kind.TEXT, *[Kind.BYTES] * (len(ids) - 2), Kind.TEXT]
    assert shown[1].text == bytewise.convert_ids_to_tokens(ids[1])


def test_special_tokens_are_marked(bytewise: Any) -> None:
    shown = TokenDecoder(bytewise).alone(bytewise.eos_token_id)
    assert shown == (bytewise.eos_token, Kind.SPECIAL)


def test_a_leading_space_is_kept_where_a_decoder_drops_it(sentencewise: Any) -> None:
    decoder = TokenDecoder(sentencewise)
    assert decoder.alone(1).text == " good"
    assert decoder.alone(2).text == "ness"
    assert [one.text for one in decoder.sequence([1, 2, 1])] == ["good", "ness", " good"]


def test_a_row_of_the_output_matrix_without_a_token_shows_its_number(bytewise: Any) -> None:
    assert TokenDecoder(bytewise).alone(10**6).text == "#1000000"
