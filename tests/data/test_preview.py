import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from aligndistil.batch import Row
from aligndistil.data import preview
from aligndistil.data.preview import PROMPT_STYLE, RESPONSE_STYLE
from support.chat_templates import Family


def test_prompt_and_response_have_their_own_colour_and_every_token_its_border(plain):
    prompt, response = plain("The film")["input_ids"], [*plain(" was good")["input_ids"], plain.eos_token_id]
    [text] = preview([Row(prompt, response)], plain)
    assert f"prompt {len(prompt)} tokens, response {len(response)} tokens, EOS" in text.plain
    body = text.plain.split("\n", 1)[1]
    assert body.replace("|", "").replace("‖", "") == "The film was good<endoftext>"
    assert len(body.split("‖")[0].split("|")) == len(prompt)

    def coloured(style):
        return "".join(text.plain[span.start : span.end] for span in text.spans if span.style == style)

    assert coloured(PROMPT_STYLE) == "The film"
    assert coloured(RESPONSE_STYLE) == " was good<|endoftext|>"


def test_a_row_without_eos_is_shown_as_truncated(plain):
    ids = plain("The film")["input_ids"]
    shown = preview([Row(ids, ids), Row(ids, []), Row(ids, ids)], plain)
    assert [text.plain.splitlines()[0].split(", ")[-1] for text in shown][:2] == ["truncated: no EOS", "no response"]
    [ended] = preview([Row(ids, ids)], plain, stop_ids=[ids[-1]])
    assert ended.plain.splitlines()[0].endswith(", EOS")


def test_the_space_before_a_sentencepiece_token_is_shown(gemma):
    ids = gemma("the film was", add_special_tokens=False)["input_ids"]
    [text] = preview([Row(ids, [])], gemma)
    assert text.plain.split("\n", 1)[1].replace("|", "").replace("‖", "").strip() == "the film was"


def test_line_breaks_are_visible(plain):
    [text] = preview([Row(plain("a\nb")["input_ids"], [])], plain)
    assert "↵\n" in text.plain


def test_labels_open_the_headers(plain):
    ids = plain("The film")["input_ids"]
    shown = preview([Row(ids, ids), Row(ids, ids), Row(ids, ids)], plain, labels=["chosen", "rejected", ""])
    assert [text.plain.split(" ")[0] for text in shown] == ["chosen:", "rejected:", "prompt"]
    with pytest.raises(ValueError, match="zip"):
        preview([Row(ids, ids), Row(ids, ids)], plain, labels=["chosen"])


@pytest.mark.parametrize("stop", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
def test_every_stop_id_is_an_end_and_no_other_token_is(stop):
    tokenizer = Family("", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|other|>"], "<|eot_id|>").tokenizer()
    stops, ids = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>"]), tokenizer("a b")["input_ids"]
    end, other = tokenizer.convert_tokens_to_ids([stop, "<|other|>"])
    rows = [Row(ids, [*ids, end]), Row(ids, [*ids, other]), Row(ids, [*ids, end, *ids])]
    endings = [text.plain.splitlines()[0].rsplit(", ", 1)[1] for text in preview(rows, tokenizer, stops)]
    assert endings == ["EOS", "truncated: no EOS", "truncated: no EOS"]


@pytest.mark.parametrize(
    ("character", "shown"),
    [
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("\x00", r"\x00"),
        ("\x08", r"\x08"),
        ("\r", r"\r"),
        ("\t", r"\t"),
        ("\x7f", r"\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202e", r"\u202e"),
        ("\u200b", r"\u200b"),
        ("\u2028", r"\u2028"),
        ("\U000e0041", r"\U000e0041"),
        ("[red]é漢👩\\", "[red]é漢👩\\"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_escaped(character, shown):
    tokenizer = Family("", ["<end>", f"<x{character}x>"], "<end>").tokenizer()
    text, ids = f"<x{character}x>", tokenizer(f"<x{character}x>")["input_ids"]
    assert len(ids) == 1
    [lines] = preview([Row(ids, ids)], tokenizer)
    printed = _printed(lines, 200)
    assert printed.count(text.replace(character, shown)) == 2
    assert all(one.isprintable() or one == "\n" for one in printed)


@pytest.mark.parametrize("width", [20, 41, 80])
def test_wide_text_is_folded_at_the_width_and_none_is_lost(width):
    words = ["漢字かな", "👩🏽", "e\u0301漢", "ﷺ", "supercalifragilistic"] * 30
    tokenizer = Family("", ["<end>", *dict.fromkeys(words)], "<end>").tokenizer()
    ids = tokenizer("".join(words))["input_ids"]
    [text] = preview([Row(ids, [])], tokenizer)
    printed = _printed(text, width)
    assert max(cell_len(line) for line in printed.splitlines()) <= width
    assert printed[printed.index("漢") :].replace("\n", "") == "|".join(words) + "‖"


def _printed(text, width):
    file = io.StringIO()
    Console(file=file, width=width).print(text)
    return file.getvalue()
