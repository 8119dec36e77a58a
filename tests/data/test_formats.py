"""Which columns a source has and what they make."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from aligndistil.batch import DataKind
from aligndistil.data import Record, load_rows, read_prompts, to_records
from aligndistil.data.formats import (
    check_feeds,
    find_columns,
    find_format,
    read_columns,
    under_our_names,
    unread_columns,
)
from aligndistil.errors import UserError
from aligndistil.recipe import Source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("\n## Layouts\n")[1].split("\n## ")[0]
KIND = {"preference": DataKind.PAIRS, "hh": DataKind.PAIRS, "unpaired": DataKind.UNPAIRED}
KIND |= {"demonstrations": DataKind.RESPONSES, "prompts": DataKind.PROMPTS}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def read(source, rows):
    """Format and records of a source, as training reads it."""
    columns = find_columns(source, rows)
    layout = find_format(source, columns, rows)
    used = rows.select_columns(read_columns(columns, rows.column_names))
    given = [under_our_names(row, columns) for row in used]
    return layout, [one for row in given for one in to_records(row, layout, KIND[layout], templated=source.templated)]


def detect(*rows, **options):
    dataset, source = Dataset.from_list(list(rows)), Source(path="rows.jsonl", **options)
    return find_format(source, find_columns(source, dataset), dataset)


def refusal(*rows, **options):
    with pytest.raises(UserError) as raised:
        detect(*rows, **options)
    return str(raised.value)


PAIR = {"chosen": "c", "rejected": "r"}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
TALK = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r", "messages": [], "score": 1.0}, "preference"),
        (HH, "hh"),
        ({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}, "hh"),
        ({"prompt": "p", "completion": "c", "label": True}, "unpaired"),
        ({"prompt": "p", "completion": "c"}, "demonstrations"),
        ({"conversations": [{"from": "human", "value": "p"}]}, "demonstrations"),
        ({"dialogue": [{"from": "human", "value": "p"}]}, "demonstrations"),
        ({"prompt": "p", "dialogue": "spoken"}, "prompts"),
        ({"prompt": "p", "category": "x"}, "prompts"),
        ({"messages": TALK, "rejected": "r"}, "preference"),
        ({"messages": TALK, "label": "false"}, "unpaired"),
        ({"messages": TALK, "label": "sports"}, "demonstrations"),
        ({"instruction": "i", "output": "o", "kto_tag": True}, "unpaired"),
        ({"prompt": "p", "responses": ["a", "b"]}, "prompts"),
        ({"prompt": "p", "answers": {"text": ["a"]}}, "prompts"),
        ({"prompt": "p", "response_0": "a", "response_1": "b"}, "prompts"),
        ({"prompt": "p", "response_0": "a", "score_0": 1}, "prompts"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "score_0": 1, "score_1": 2}, "preference"),
        ({"prompt": "p", "answer_a": "a", "answer_b": "b", "winner": "a"}, "preference"),
    ],
)
def test_the_columns_show_the_format(row, expected):
    assert detect(row) == expected


@pytest.mark.parametrize(("rows", "expected"), [([PAIR, HH, HH], "hh"), ([HH, PAIR, PAIR], "preference")])
def test_hh_is_what_most_rows_look_like_not_the_first(rows, expected):
    assert detect(*rows) == expected


def test_a_format_that_fits_can_be_named():
    assert detect({"prompt": "p", **PAIR}, format="hh") == "hh"
    assert detect({"messages": TALK, "label": 0}, format="demonstrations") == "demonstrations"


def test_columns_that_make_nothing_are_shown_with_the_known_formats_and_a_mapping():
    said = refusal({"query": "What is it?", "reply": "x" * 90})
    assert "[query, reply] make no known format (preference: chosen+rejected" in said
    assert "'query': 'What is it?'" in said
    assert "x" * 50 not in said
    assert "`columns: {prompt: query}`" in said


def test_a_mapping_gives_columns_our_names():
    row = {"request": "p", "reply": "c"}
    assert detect(row, columns={"prompt": "request", "completion": "reply"}) == "demonstrations"
    with pytest.raises(UserError, match=r"columns\.prompt names 'requests', which is not there; .*'request'"):
        detect(row, columns={"prompt": "requests"})
    with pytest.raises(UserError, match=r"columns\.question is none of prompt, input, chosen"):
        detect(row, columns={"question": "request"})


@pytest.mark.parametrize(
    ("path", "nearest"), [("pos.anser", "pos.answer"), ("pos.answer.text", "pos.answer"), ("pso.answer", "pos")]
)
def test_a_field_that_is_not_there_is_refused_with_those_that_are(path, nearest):
    row = {"prompt": "p", "pos": {"answer": "a", "score": 1}, "rejected": "r"}
    assert f"names {path!r}, which is not there; the nearest is {nearest!r}" in refusal(row, columns={"chosen": path})


def test_a_column_with_a_dot_in_its_name_is_that_column():
    rows = Dataset.from_list([{"prompt": "p", "pos.answer": "c", "pos": {"answer": "x"}, "rejected": "r"}])
    source = Source(path="rows.jsonl", columns={"chosen": "pos.answer"})
    assert read(source, rows) == ("preference", [Record("p", ("c", "r"))])


def test_a_column_of_fields_is_refused_with_the_one_that_holds_text():
    row = {"prompt": "p", "chosen": {"score": 1, "answer": "c"}, "rejected": {"score": 0, "answer": "r"}}
    assert "as in `columns: {chosen: chosen.answer}`" in refusal(row)


SHARED = {"chosen": "<think>\nIt is.", "rejected": "<think>\nIt may be."}


@pytest.mark.parametrize(
    ("others", "mapping"),
    [
        ({"question": "Is it?"}, "prompt: question"),
        ({"question": "Is it?", "system": "Be brief."}, "prompt: question"),
        ({"instruction": "Add.", "input": "1 and 2"}, "prompt: instruction, input: input"),
        ({"context_messages": [user("Is it?")]}, "prompt: context_messages"),
        ({"context_messages": json.dumps([user("Is it?")])}, "prompt: context_messages"),
        ({"info": {"post": "Is it even?", "id": "x1"}}, "prompt: info.post"),
        ({"turns": ["Is it even?"]}, "prompt: turns.0"),
        ({"source": "Is it even or odd?"}, "prompt: source"),
        ({"history": [user("Is it?")]}, "prompt: history"),
        ({"history": "Is it?"}, "prompt: history"),
        ({"frage": "Ist es?"}, "prompt: frage"),
        ({"output": "It is.", "query": "Is it?"}, "prompt: query"),
    ],
)
@pytest.mark.parametrize("answer", [str, lambda text: [assistant(text)]])
def test_no_prompt_is_made_of_what_answers_share_while_it_may_stand_elsewhere(others, mapping, answer):
    pair = {name: answer(text) for name, text in SHARED.items()}
    said = refusal({**pair, **others})
    assert f"`columns: {{{mapping}}}`" in said
    assert all(name in said for name in others if name != "system")
    columns = dict(part.split(": ") for part in mapping.split(", "))
    assert detect({**pair, **others}, columns=columns) == "preference"


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"id": "a-long-identifier"},
        {"chosen_model": "a model"},
        {"score": "4.5", "lang": "en"},
        {"scores": [1, 2], "meta": {"source": "the web"}},
        {"system": "Be brief."},
        {"question": None},
        {"question": " "},
    ],
)
def test_the_common_beginning_is_the_prompt_where_there_is_no_other_text(others):
    rows = Dataset.from_list([{"chosen": "Q: it?\nA: yes", "rejected": "Q: it?\nA: no", **others}])
    layout, records = read(Source(path="rows.jsonl"), rows)
    prompt = "Q: it?\n" if "system" not in others else [{"role": "system", "content": "Be brief."}, user("Q: it?\n")]
    assert (layout, records) == ("preference", [Record(prompt, ("A: yes", "A: no"))])


def test_a_text_column_in_a_later_row_counts():
    row = {"chosen": "Q: it?\nA: yes", "rejected": "Q: it?\nA: no", "question": None}
    assert "[question]" in refusal(*[row] * 5, {**row, "question": "Is it?"})


def test_conversations_and_hh_need_no_prompt_column_whatever_else_is_there():
    other = {"question": "Is it even?"}
    assert detect({"chosen": TALK, "rejected": [user("q"), assistant("r")], **other}) == "preference"
    assert detect({**HH, **other}) == "hh"


def test_ranked_answers_without_a_prompt_are_refused():
    row = {"instruction": "Is it?", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]}
    assert refusal(row).endswith("name the prompt, as in `columns: {prompt: instruction}`")


@pytest.mark.parametrize("name", ["images", "image", "audio", "videos"])
def test_columns_that_are_not_text_are_refused_by_name_unless_empty_or_left_unread(name):
    row = {"prompt": "p", **PAIR, name: ["a.png"]}
    assert f"the column {name} is not text" in refusal(row)
    assert detect(row, columns={name: ""}) == "preference"
    assert detect({**row, name: []}) == detect({**row, name: None}) == "preference"


def test_labels_that_are_none_or_could_mean_two_things_are_refused():
    row = {"prompt": "p", "completion": "c"}
    assert "label is 'sports', none of true" in refusal({**row, "label": "sports"})
    assert "-1 in some rows and 0 in others" in refusal(*({**row, "label": label} for label in (1, 0, -1)))
    assert detect({**row, "label": "sports"}, columns={"label": ""}) == "demonstrations"


def test_columns_that_nothing_reads_are_known():
    rows = Dataset.from_list(
        [{"pos": {"answer": "c"}, "id": 1, "rejected": "r", "prompt": "p", "messages": TALK, "label": True, "extra": 2}]
    )
    columns = find_columns(Source(path="rows.jsonl", columns={"chosen": "pos.answer"}), rows)
    assert unread_columns(columns, rows.column_names) == ["id", "messages", "label", "extra"]
    assert read_columns(columns, rows.column_names) == ["pos", "rejected", "prompt"]


def test_final_text_is_not_given_a_system_turn():
    rows = Dataset.from_list([{"prompt": "<|user|>p", **PAIR, "system": "S", "tools": "[]"}])
    source = Source(path="rows.jsonl", templated=True)
    assert read(source, rows) == ("preference", [Record("<|user|>p", ("c", "r"), templated=True)])
    assert unread_columns(find_columns(source, rows), rows.column_names) == ["system", "tools"]


def test_a_named_format_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"format preference needs the columns chosen\+rejected .* \[prompt\]"):
        detect({"prompt": "p"}, format="preference")


def test_rows_that_cannot_feed_the_objective_are_refused_with_those_that_can():
    source = Source(path="rows.jsonl")
    rows = Dataset.from_list([{"prompt": "p", "good": "c", "bad": "r"}])
    with pytest.raises(UserError, match=r"eats pairs, which prompts rows do not give; .* preference, hh") as raised:
        check_feeds(source, "prompts", DataKind.PAIRS, rows, reverse=False)
    assert "`columns: {chosen: good, rejected: bad}`" in str(raised.value)
    with pytest.raises(UserError, match="cannot reverse demonstrations"):
        check_feeds(source, "demonstrations", DataKind.RESPONSES, rows, reverse=True)
    check_feeds(source, "hh", DataKind.UNPAIRED, rows, reverse=True)


def test_prompts_are_read_from_any_layout(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"q": {"text": "Is it?"}, "system": "S", **PAIR}, {"q": {"text": " "}, "system": "S", **PAIR}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source(path=str(path), columns={"prompt": "q.text"})
    assert list(read_prompts(source)) == [Record([{"role": "system", "content": "S"}, user("Is it?")], ())]


YES_NO = ("Yes.", "No.")
ASKED = [user("Is 7 odd?")]
ODD = "Say whether it is odd.\n\n7"
CALL = {"type": "function", "function": {"name": "divide", "arguments": {"by": 2}}}
SHOWN = {
    "Pairs": Record("Is 7 odd?", YES_NO),
    "Pairs of conversations": Record(ASKED, YES_NO),
    "Pairs of text that begin with the prompt": Record("Question: Is 7 odd?\n", ("Answer: Yes.", "Answer: No.")),
    "HH-RLHF": Record(ASKED, YES_NO),
    "Other column names": Record("Is 7 odd?", YES_NO),
    "Fields and list items": Record("Is 7 odd?", YES_NO),
    "Instruction and input with pairs": Record(ODD, YES_NO),
    "ShareGPT ranking": Record(ASKED, YES_NO),
    "A conversation and a rejected answer": Record(ASKED, YES_NO),
    "Two answers and a choice": Record("Is 7 odd?", YES_NO),
    "Answers with scores": Record("Is 7 odd?", YES_NO),
    "A list of answers that hold their score": Record("Is 7 odd?", YES_NO),
    "Unpaired": Record("Is 7 odd?", ("Yes.",)),
    "Unpaired conversations": Record(ASKED, ("No.",), label=False),
    "Demonstrations": Record(ASKED, ("Yes.",)),
    "Alpaca": Record(ODD, ("Yes.",)),
    "Instruction, context and response": Record(ODD, ("Yes.",)),
    "Prompts": Record("Is 7 odd?", ()),
    "System, history and tools": Record(
        [{"role": "system", "content": "Be brief."}, user("Is 6 odd?"), assistant("No."), *ASKED],
        YES_NO,
        tools=[{"name": "divide"}],
    ),
    "Conversations as JSON text": Record(ASKED, ("Yes.",)),
    "Calls of tools": Record(
        [*ASKED, {**assistant(""), "tool_calls": [CALL]}, {"role": "tool", "content": "3.5"}], ("Yes.",)
    ),
}
LAYOUTS = {
    name: (rows, lines)
    for name, rows, lines in re.findall(
        r"^### (.+?)\n(?:(?!^### ).)*?```json\n(.*?)```\n```yaml\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL
    )
}


def test_the_page_shows_every_layout():
    assert LAYOUTS.keys() == SHOWN.keys() == {*re.findall("^### (.+)$", PAGE, re.MULTILINE)}


@pytest.mark.parametrize("name", SHOWN)
def test_a_row_of_the_page_is_read_by_the_lines_beside_it(name, tmp_path):
    rows, lines = LAYOUTS[name]
    source = Source(**yaml.safe_load(lines)["train"])
    (tmp_path / source.path).write_text(rows)
    source = source.model_copy(update={"path": str(tmp_path / source.path)})
    assert read(source, load_rows(source))[1] == [SHOWN[name]]


BEGIN_ALIKE = {"chosen": "Sure! Yes.", "rejected": "Sure! No."}


@pytest.mark.parametrize(
    "asked", [{"question": "1+1"}, {"question": "你好"}, {"question": 7}, {"data": {"question": "Capital France?"}},
              {"source": "今天天气怎么样我想知道"}],
)  # fmt: skip
def test_a_column_that_is_called_a_question_is_one_however_short(asked):
    assert "other columns with text are" in refusal({**BEGIN_ALIKE, **asked})


def test_what_most_answers_begin_with_is_no_prompt():
    assert "most of their answers begin with 'Sure!', which is no prompt" in refusal(*[BEGIN_ALIKE] * 2)
    assert detect(*[BEGIN_ALIKE] * 2, columns={"prompt": ""}) == "preference"


def test_final_text_needs_a_prompt_column():
    row = {"chosen": "<a>Is it?<b>Yes.", "rejected": "<a>Is it?<b>No."}
    assert "is not cut into prompt and answer" in refusal(row, templated=True)


def test_a_column_cannot_be_two():
    assert "are both prompt; name two" in refusal(
        {"prompt": "p", "rejected": "r"}, columns={"prompt": "prompt", "chosen": "prompt"}
    )


@pytest.mark.parametrize(
    ("names", "fine"),
    [(["good", "bad"], False), (["true", "false"], False), (["false", "true"], True), (["0", "1"], True)],
)
def test_names_of_classes_that_contradict_their_numbers_are_refused(names, fine):
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)})
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [0, 1]}, features=features)
    source = Source(path="rows.parquet")
    if fine:
        assert find_format(source, find_columns(source, dataset), dataset) == "unpaired"
    else:
        with pytest.raises(UserError, match="the column label has numbers for the names"):
            find_format(source, find_columns(source, dataset), dataset)
