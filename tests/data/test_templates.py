"""The ways of the chat templates of eight model families: token for token, or refused."""

import json
import re
from typing import Any

import pytest

from aligndistil.data import Record
from aligndistil.data.records import Unusable
from aligndistil.data.templating import (
    EMPTY_THOUGHT,
    LEFT_OUT,
    MARKED,
    TEMPLATE_REASONS,
    THINKS_ANYWAY,
    THINKS_TWICE,
)
from aligndistil.errors import UserError
from support.chat_templates import CHATML_OPENING, CHATML_SPECIALS, CHATML_TURN, FAMILIES, Family

OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


CHAT = [user("Rain?"), assistant("No."), user("Wind?")]
TOOL = {"type": "function", "function": {"name": "forecast"}}
CALL = {"type": "function", "function": {"name": "forecast", "arguments": '{"town": 3}'}}
CALLED = [user("Rain?"), assistant("", tool_calls=[CALL]), {"role": "tool", "name": "forecast", "content": "0 mm"}]
TODAY = "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n"

# family, template_kwargs, prompt, answer, tools, the prompt's text, the response's text
ROWS: dict[str, tuple[str, dict[str, Any], Any, Any, Any, str, str]] = {
    "a default system turn": (
        "qwen2.5", {}, "Wind?", "None.", None,
        "<|im_start|>system\nYou are Miniature.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "None.<|im_end|>",
    ),
    "a system turn instead of the default one": (
        "qwen2.5", {}, [system("Be terse."), user("Wind?")], "None.", None,
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "None.<|im_end|>",
    ),
    "tools and calls": (
        "qwen2.5", {}, CALLED, "None.", (TOOL,),
        '<|im_start|>system\nYou are Miniature.\n# Tools\n{"type": "function", "function": {"name": "forecast"}}'
        "<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>forecast {"town": 3}<|im_end|>\n'
        "<|im_start|>user\n<tool_response>0 mm</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "None.<|im_end|>",
    ),
    "an answer that calls a tool": (
        "qwen2.5", {}, "Rain?", {"role": "assistant", "tool_calls": [CALL]}, (TOOL,),
        '<|im_start|>system\nYou are Miniature.\n# Tools\n{"type": "function", "function": {"name": "forecast"}}'
        "<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>forecast {"town": 3}<|im_end|>',
    ),
    "reasoning as text is text where the template knows none": (
        "qwen2.5", {}, [system("Be."), user("Wind?")], "<think>\nSea.\n</think>\n\nYes.", None,
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nSea.\n</think>\n\nYes.<|im_end|>",
    ),
    "thinking off: the empty thought is prompt": (
        "qwen3", OFF, CHAT, "Yes.", None,
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Yes.<|im_end|>",
    ),
    "thinking on, reasoning as text": (
        "qwen3", {}, "Wind?", "<think>\nSea.\n</think>\n\nYes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nSea.\n</think>\n\nYes.<|im_end|>",
    ),
    "thinking on, the line breaks around the tags are the template's": (
        "qwen3", ON, "Wind?", "<think>Sea.</think>Yes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nSea.\n</think>\n\nYes.<|im_end|>",
    ),
    "thinking on, reasoning beside the text": (
        "qwen3", ON, "Wind?", assistant("Yes.", reasoning_content="Sea."), None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nSea.\n</think>\n\nYes.<|im_end|>",
    ),
    "the reasoning of an earlier answer is dropped": (
        "qwen3", OFF, [user("Rain?"), assistant("<think>\nDry.\n</think>\n\nNo."), user("Wind?")], "Yes.", None,
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Yes.<|im_end|>",
    ),
    "an answer's own empty thought is the answer's": (
        "qwen3", ON, "Wind?", "<think>\n\n</think>\n\nYes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ),
    "the prompt opens the thought, the answer says it again": (
        "always", {}, "Wind?", "<think>\nSea.\n</think>\n\nYes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "Sea.\n</think>\n\nYes.<|im_end|>",
    ),
    "the prompt opens the thought, the answer goes on": (
        "always", {}, "Wind?", "Sea.\n</think>\n\nYes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "Sea.\n</think>\n\nYes.<|im_end|>",
    ),
    "thinking off, closed at once": (
        "tight", OFF, "Wind?", "Yes.", None,
        "<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n<think></think>", "Yes.<|im_end|>",
    ),
    "thinking is asked for in the system turn": (
        "asked", ON, "Wind?", "Yes.", None,
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
    ),
    "a date, a BOS, trimmed content": (
        "llama3", {}, " Wind?\n", " Yes.\n", None,
        f"<|begin_of_text|>{TODAY}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWind?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
    ),
    "another date": (
        "llama3", {"date_string": "1 May 2020"}, [system("Be."), user("Wind?")], "Yes.", None,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 1 May 2020\n\nBe.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWind?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
    ),
    "tools, and what they say as JSON": (
        "llama3", {}, [*CALLED[:2], {"role": "tool", "content": 'a "0"\nb'}], "None.", [TOOL],
        f'<|begin_of_text|>{TODAY}{{"type": "function", "function": {{"name": "forecast"}}}}\n\n<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\nRain?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "forecast", "arguments": {"town": 3}}<|eot_id|>'
        '<|start_header_id|>tool<|end_header_id|>\n\n"a \\"0\\"\\nb"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "None.<|eot_id|>",
    ),
    "the system's words in the user's turn": (
        "gemma3", {}, [system("Be terse."), *CHAT], " Yes. ", None,
        "<bos><start_of_turn>user\nBe terse.\n\nRain?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n"
        "<start_of_turn>user\nWind?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
    ),
    "no generation prompt": (
        "mistral", {}, CHAT, "Yes.", None, "<s>[INST] Rain? [/INST] No.</s>[INST] Wind? [/INST]", " Yes.</s>",
    ),
    "the end of the text after the end of the turn": (
        "phi", {}, CHAT, "Yes.", None,
        "<|user|>\nRain?<|end|>\n<|assistant|>\nNo.<|end|>\n<|user|>\nWind?<|end|>\n<|assistant|>\n",
        "Yes.<|end|>",
    ),
    "a default system turn, when the row has none": (
        "smollm2", {}, CHAT, "Yes.", None,
        "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nWind?<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_row_token_for_token(case):
    name, kwargs, prompt, answer, tools, prompt_text, response_text = ROWS[case]
    family = FAMILIES[name]
    encoder = family.encoder(template_kwargs=kwargs)
    tokenizer = encoder.tokenizer
    [encoded] = encoder.encode([Record(prompt, (answer,), tools=tools)])
    assert not isinstance(encoded, Unusable), encoded
    [row] = encoded.rows
    assert (tokenizer.decode(row.prompt_ids), tokenizer.decode(row.response_ids)) == (prompt_text, response_text)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt_text, response_text)]
    assert [row.prompt_ids, row.response_ids] == ids
    assert not encoded.shifted
    assert [*row.prompt_ids, *row.response_ids].count(tokenizer.bos_token_id) == bool(family.bos)
    assert [token in encoder.stop_ids for token in row.response_ids].count(True) == 1
    assert row.response_ids[-1] in encoder.stop_ids
    [alone] = encoder.encode([Record(prompt, (), tools=tools)])
    assert not isinstance(alone, Unusable)
    assert alone.rows[0].prompt_ids == row.prompt_ids, "a rollout is asked something else than the data was trained on"


REFUSED: dict[str, tuple[str, dict[str, Any], Any, Any, Any, str]] = {
    "an empty thought": ("qwen3", {}, "Wind?", "Yes.", None, f"{EMPTY_THOUGHT}.*enable_thinking: false"),
    "the same, though said": ("qwen3", ON, "Wind?", "Yes.", None, f"{EMPTY_THOUGHT}.*enable_thinking: false"),
    "an empty thought, and no way out": ("always", {}, "Wind?", "Yes.", None, f"{EMPTY_THOUGHT}.*with their reasoning"),
    "an empty thought that closes the prompt's": (
        "tight", {}, "Wind?", "Yes.", None, f"{EMPTY_THOUGHT}.*enable_thinking: false",
    ),
    "reasoning where thinking is off": ("qwen3", OFF, "Wind?", "<think>\nSea.\n</think>\n\nYes.", None, THINKS_ANYWAY),
    "reasoning beside the text, where thinking is off": (
        "qwen3", OFF, "Wind?", assistant("Yes.", reasoning_content="Sea."), None, THINKS_ANYWAY,
    ),
    "reasoning that is dropped": ("r1", {}, "Wind?", "Sea.\n</think>\n\nYes.", None, f"{LEFT_OUT} part of the answer"),
    "reasoning beside the text that is dropped": (
        "r1", {}, "Wind?", assistant("Yes.", reasoning_content="Sea."), None, f"{LEFT_OUT} the reasoning_content",
    ),
    "a system turn": ("mistral", {}, [system("Be."), user("Wind?")], "Yes.", None, "refuses.*only user and assistant"),
    "two questions in a row": ("gemma3", {}, [user("Rain?"), user("Wind?")], "Yes.", None, "refuses.*must alternate"),
    "tools that go nowhere": ("gemma3", {}, "Wind?", "Yes.", (TOOL,), f"{LEFT_OUT} the tools"),
    "calls that go nowhere": (
        "smollm2", {}, [user("Wind?"), assistant("", tool_calls=[CALL]), user("And?")], "Yes.", None,
        f"{LEFT_OUT} the tool_calls",
    ),
    "a call as the answer that goes nowhere": (
        "smollm2", {}, "Wind?", assistant("Yes.", tool_calls=[CALL]), None, f"{LEFT_OUT} the tool_calls of the answer",
    ),
    "arguments that the template cannot write": (
        "mistral", {}, [user("Rain?"), assistant("", tool_calls=[CALL]), CALLED[2]], "No.", (TOOL,), "refuses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_template_does_not_write_as_it_is_said_is_refused(case):
    name, kwargs, prompt, answer, tools, reason = REFUSED[case]
    [encoded] = FAMILIES[name].encoder(template_kwargs=kwargs).encode([Record(prompt, (answer,), tools=tools)])
    assert isinstance(encoded, Unusable)
    assert re.search(reason, str(encoded)), encoded
    assert str(encoded).startswith((*TEMPLATE_REASONS, "the chat template refuses"))


def test_what_a_model_has_said_is_read_as_the_template_writes_it():
    encoder = FAMILIES["qwen3"].encoder(checked=False)
    again = "Say it again, please: wind?"
    for prompt, answer in (("Wind?", "Yes."), (again, again), ("Wind?", "a<|im_start|>b"), ("a<|im_start|>b", "No.")):
        [encoded] = encoder.encode([Record(prompt, (answer,))])
        [row] = encoded.rows
        assert encoder.tokenizer.decode([*row.prompt_ids, *row.response_ids]) == (
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{answer}<|im_end|>"
        )
    assert encoder.fingerprint() != FAMILIES["qwen3"].encoder().fingerprint()


def test_an_answer_that_does_not_continue_an_opened_thought_is_a_boundary_mismatch():
    encoder = FAMILIES["r1"].encoder()
    [encoded] = encoder.encode([Record("Wind?", ("Yes.",))])
    [row] = encoded.rows
    assert encoded.shifted
    assert encoder.tokenizer.decode(row.prompt_ids) == "<｜begin｜><｜User｜>Wind?<｜Assistant｜>"
    assert encoder.tokenizer.decode(row.response_ids) == "Yes.<｜end｜>"


@pytest.mark.parametrize("arguments", ['{"town": 3}', "not JSON", "[3]"])
def test_a_template_that_reads_arguments_as_text_gets_the_rows_own(arguments):
    call = {"type": "function", "function": {"name": "forecast", "arguments": arguments}}
    encoder = FAMILIES["r1"].encoder()
    [encoded] = encoder.encode([Record([user("Rain?"), assistant("", tool_calls=[call]), *CALLED[2:]], ())])
    text = encoder.tokenizer.decode(encoded.rows[0].prompt_ids)
    assert text == f"<｜begin｜><｜User｜>Rain?<｜Call｜>forecast{arguments}<｜end｜>0 mm<｜Assistant｜><think>\n"


def test_final_text_reads_as_it_stands_where_the_template_cannot_write_it():
    encoder = FAMILIES["r1"].encoder()
    prompt = "<｜User｜>Wind?<｜Assistant｜><think>\n"
    [encoded] = encoder.encode([Record(prompt, ("Sea.\n</think>\n\nYes.",), templated=True)])
    [row] = encoded.rows
    assert encoder.tokenizer.decode(row.prompt_ids) == f"<｜begin｜>{prompt}"
    assert encoder.tokenizer.decode(row.response_ids) == "Sea.\n</think>\n\nYes.<｜end｜>"
    assert row.prompt_ids == encoder.encode([Record("Wind?", ())])[0].rows[0].prompt_ids


def test_a_thought_that_is_opened_twice_is_refused():
    twice = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}<think>{% endif %}"
    twice += (
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    encoder = Family(twice, CHATML_SPECIALS, "<|im_end|>").encoder()
    again, once = encoder.encode([Record("Wind?", (text,)) for text in ("<think>Sea.</think>", "Sea.</think>Yes.")])
    assert str(again) == THINKS_TWICE
    assert encoder.tokenizer.decode(once.rows[0].response_ids) == "Sea.</think>Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "kwargs", "mode"),
    [
        ("qwen3", OFF, "thinking: off (enable_thinking: false)"),
        ("qwen3", ON, "thinking: on (enable_thinking: true)"),
        ("qwen3", {}, "thinking: on (the chat template's default)"),
        ("always", {}, "thinking: on (the chat template's default)"),
        ("tight", {}, "thinking: on (the chat template's default)"),
        ("tight", OFF, "thinking: off (enable_thinking: false)"),
        ("asked", {}, "thinking: off (the chat template's default)"),
        ("asked", ON, "thinking: on (enable_thinking: true)"),
        ("r1", {}, "thinking: on (the chat template's default)"),
        *((name, {}, None) for name in ("qwen2.5", "llama3", "gemma3", "mistral", "phi", "smollm2")),
    ],
)
def test_the_mode_is_said(name, kwargs, mode):
    assert FAMILIES[name].encoder(template_kwargs=kwargs).mode() == mode


MARKERS = {
    "qwen2.5": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "phi": ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
    "r1": ["<｜begin｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end｜>"],
}


@pytest.mark.parametrize(("name", "marker"), [(name, marker) for name in MARKERS for marker in MARKERS[name]])
def test_text_with_a_marker_of_the_template_is_refused_by_its_name(name, marker):
    encoder, text = FAMILIES[name].encoder(), f"So {marker} says a prompt"
    records = [
        Record(text, ()),
        Record([user(text)], ("Yes.",)),
        Record([user("Rain?"), assistant(text), user("Wind?")], ("Yes.",)),
        Record("Wind?", (text,)),
        Record("Wind?", (f"{marker}Yes.{encoder.tokenizer.eos_token}",)),
    ]
    for one in encoder.encode(records):
        assert str(one) == f"{MARKED}, {marker!r}"


@pytest.mark.parametrize("template", ["### Ask:\n{0}\n\n### Say:\n", "USER: {0} ASSISTANT: ", "<|user|>{0}<|bot|>"])
def test_markers_that_are_no_special_tokens_are_found_too(template):
    asking, opening = template.split("{0}")
    text = f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {asking!r} + m.content }}}}{{% else %}}"
    text += f"{{{{ {opening!r} + m.content }}}}{{% endif %}}{{% endfor %}}"
    text += f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"
    encoder = Family(text, ["<|endoftext|>"], "<|endoftext|>").encoder()
    twice, once, near = encoder.encode([Record(p, ("A.",)) for p in (template.format("Wind?"), "Wind?", "USER: <b>?")])
    assert str(twice).startswith(MARKED)
    assert not isinstance(once, Unusable)
    assert not isinstance(near, Unusable)


@pytest.mark.parametrize("text", ["Is a < b > c?", "An [INST is none", "a<|im_|>b", "<think> is a tag", "[0] and <p>"])
@pytest.mark.parametrize("name", ["qwen2.5", "mistral", "phi", "qwen3"])
def test_text_with_other_brackets_is_text(name, text):
    [encoded] = FAMILIES[name].encoder(template_kwargs=OFF if name == "qwen3" else {}).encode([Record(text, ("Yes.",))])
    assert not isinstance(encoded, Unusable), encoded


@pytest.mark.parametrize(
    ("loss", "template", "answer", "kept"),
    [
        ("trims inside", "m.content | replace('  ', ' ')", "a  b", "a b"),
        ("cuts", "m.content[:5]", "a long answer", "short"),
        ("lowers", "m.content | lower", "Yes", "yes"),
        ("drops what the prompt says too", "'' if m.role == 'assistant' else m.content", "Wind?", None),
    ],
)
def test_an_answer_must_stand_in_its_row(loss, template, answer, kept):
    text = f"{{% for m in messages %}}<|im_start|>{{{{ m.role + '\\n' + ({template}) }}}}<|im_end|>{{% endfor %}}"
    encoder = Family(text + CHATML_OPENING, CHATML_SPECIALS, "<|im_end|>").encoder()
    assert str(encoder.encode([Record("wind?", (answer,))])[0]) == f"{LEFT_OUT} part of the answer", loss
    if kept is not None:
        assert not isinstance(encoder.encode([Record("wind?", (kept,))])[0], Unusable)


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_turn_that_the_template_passes_over_is_refused(role):
    text = "{% for m in messages if m.role in ('user', 'assistant') %}" + CHATML_TURN + "{% endfor %}" + CHATML_OPENING
    encoder = Family(text, CHATML_SPECIALS, "<|im_end|>").encoder()
    [encoded] = encoder.encode([Record([{"role": role, "content": "Be terse."}, user("Wind?")], ())])
    assert str(encoded) == f"{LEFT_OUT} the content of a turn of {role}"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"enable_thinkin": False}, "does not read 'enable_thinkin'"), ({"tools": []}, "'tools' comes from the rows")],
)
def test_arguments_that_the_template_does_not_read_are_refused(wrong, why):
    with pytest.raises(UserError, match=rf"model\.chat_template_kwargs: .*{why}"):
        FAMILIES["qwen3"].encoder(template_kwargs=wrong)


def test_rows_do_not_change_by_the_day(monkeypatch):
    """transformers asks `datetime.now()`; whatever it would say, no token depends on it."""
    encoder = FAMILIES["llama3"].encoder()
    [encoded] = encoder.encode([Record("Wind?", ())])
    assert "Today: 26 Jul 2024\n" in encoder.tokenizer.decode(encoded.rows[0].prompt_ids)
    formats = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %B %-d, %A') }}{% endif %}"
    formats += "{{ messages[0].content }}"
    other = Family(formats, CHATML_SPECIALS, "<|im_end|>").encoder()
    [encoded] = other.encode([Record("Wind?", ())])
    assert other.tokenizer.decode(encoded.rows[0].prompt_ids) == "2024-07-26, July 26, FridayWind?"


def test_the_fingerprint_covers_the_templates_arguments_and_what_becomes_of_long_prompts():
    family = FAMILIES["qwen3"]
    encoders = [
        family.encoder(),
        family.encoder(template_kwargs=OFF),
        family.encoder(template_kwargs=ON),
        family.encoder(overlong_prompts="drop"),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == len(encoders)
    assert family.encoder(template_kwargs=OFF).fingerprint() == encoders[1].fingerprint()


LONG = "what is the wind like on the far side of the hill" + "?" * 100
KEPT = {
    "the row's": ("qwen2.5", [system("Be terse."), user(LONG)], None, "<|im_start|>system\nBe terse.<|im_end|>\n"),
    "the template's": ("qwen2.5", LONG, None, "<|im_start|>system\nYou are Miniature.<|im_end|>\n"),
    "with its tools": (
        "qwen2.5", [system("Be."), user(LONG)], (TOOL,),
        f"<|im_start|>system\nBe.\n# Tools\n{json.dumps(TOOL)}<|im_end|>\n",
    ),
    "with a date": ("llama3", [system("Be."), user(LONG)], None, f"<|begin_of_text|>{TODAY}Be.<|eot_id|>"),
    "in the user's turn": (
        "gemma3", [system("Be terse."), user(LONG)], None, "<bos><start_of_turn>user\nBe terse.\n\n",
    ),
    "none but a BOS": ("mistral", LONG, None, "<s>"),
    "none": ("phi", LONG, None, ""),
    "without an end": ("r1", [system("Be terse."), user(LONG)], None, "<｜begin｜>Be terse."),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_the_system_turn_is_kept_when_a_prompt_is_cut(case):
    name, prompt, tools, head = KEPT[case]
    encoder = FAMILIES[name].encoder()
    [whole] = encoder.encode([Record(prompt, (), tools=tools)])
    ids, head_ids = whole.rows[0].prompt_ids, encoder.tokenizer(head, add_special_tokens=False)["input_ids"]
    room = len(head_ids) + 30
    [cut] = FAMILIES[name].encoder(max_prompt_length=room).encode([Record(prompt, (), tools=tools)])
    assert cut.prompt_truncated
    assert cut.rows[0].prompt_ids == [*head_ids, *ids[-30:]]
    [uncut] = FAMILIES[name].encoder(max_prompt_length=len(ids)).encode([Record(prompt, (), tools=tools)])
    assert uncut == whole


@pytest.mark.parametrize("room", [1, 10])
def test_a_system_turn_that_leaves_no_room_is_refused(room):
    [encoded] = FAMILIES["qwen2.5"].encoder(max_prompt_length=room).encode([Record(LONG, ())])
    assert str(encoded).startswith("the system turn has max_prompt_length tokens or more")


def test_overlong_prompts_are_dropped_where_the_recipe_says_so():
    whole = FAMILIES["phi"].encoder().encode([Record(LONG, ("Yes.",))])
    length = len(whole[0].rows[0].prompt_ids)
    same, dropped = (
        FAMILIES["phi"].encoder(max_prompt_length=room, overlong_prompts="drop").encode([Record(LONG, ("Yes.",))])
        for room in (length, length - 1)
    )
    assert same == whole
    assert str(dropped[0]) == "the prompt has more than max_prompt_length tokens"
