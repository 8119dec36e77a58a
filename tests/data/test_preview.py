from aligndistil.batch import Row
from aligndistil.data import preview
from aligndistil.data.preview import PROMPT_STYLE, RESPONSE_STYLE


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
