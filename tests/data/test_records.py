"""Raw rows of every shape peers' data sets have, and the reasons for which one is dropped."""

import json

import pytest

from aligndistil.batch import DataKind
from aligndistil.data import Record, to_records
from aligndistil.data.records import Unusable

PAIRS, RESPONSES, PROMPTS, UNPAIRED = DataKind.PAIRS, DataKind.RESPONSES, DataKind.PROMPTS, DataKind.UNPAIRED


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def reason(row, layout="preference", kind=PAIRS, **options):
    with pytest.raises(Unusable) as raised:
        to_records(row, layout, kind, **options)
    return str(raised.value)


def test_explicit_prompt_with_strings():
    row = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    assert to_records(row, "preference", PAIRS) == [Record("Hi", ("Hi there", "Hi you"))]


def test_explicit_prompt_with_messages():
    row = {"prompt": [user("Hi")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert to_records(row, "preference", PAIRS) == [Record([user("Hi")], ("good", "bad"))]


def test_implicit_prompt_is_the_opening_that_both_conversations_share():
    opening = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("And?")]
    row = {"chosen": [*opening, assistant("good")], "rejected": [*opening, assistant("bad")]}
    assert to_records(row, "preference", PAIRS) == [Record(opening, ("good", "bad"))]


def test_ultrafeedback_shape_the_prompt_is_not_repeated():
    row = {"prompt": "Hi", "chosen": [user("Hi"), assistant("good")], "rejected": [user("Hi"), assistant("bad")]}
    assert to_records(row, "preference", PAIRS) == [Record([user("Hi")], ("good", "bad"))]


def test_a_prompt_that_does_not_open_its_conversation_is_not_guessed_at():
    row = {"prompt": "Hello", "chosen": [user("Hi"), assistant("good")], "rejected": [user("Hi"), assistant("bad")]}
    assert reason(row) == "the prompt is not the opening of the conversation"
    row["prompt"] = [user("Hello")]
    assert reason(row) == "the prompt is not the opening of the conversation"


def test_implicit_prompt_of_strings_ends_at_a_line_break_not_inside_the_answers():
    row = {"chosen": "Q: hi\nA: I think so", "rejected": "Q: hi\nA: I doubt it"}
    assert to_records(row, "preference", PAIRS) == [Record("Q: hi\n", ("A: I think so", "A: I doubt it"))]
    row = {"chosen": "say it yes", "rejected": "say it yeah"}
    assert to_records(row, "preference", PAIRS) == [Record("say it ", ("yes", "yeah"))]


def test_human_and_gpt_with_from_and_value_are_user_and_assistant():
    turns = [{"from": "human", "value": "Hi", "role": None}, {"from": "gpt", "value": "good"}]
    row = {"messages": turns}
    assert to_records(row, "demonstrations", RESPONSES) == [Record([user("Hi")], ("good",))]


def test_demonstrations_as_prompt_and_completion_or_messages():
    assert to_records({"prompt": "Hi", "completion": "yes"}, "demonstrations", RESPONSES) == [Record("Hi", ("yes",))]
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert to_records({"messages": messages}, "demonstrations", RESPONSES) == [Record(messages[:3], ("d",))]
    row = {"prompt": [user("Hi")], "completion": [assistant("yes")]}
    assert to_records(row, "demonstrations", RESPONSES) == [Record([user("Hi")], ("yes",))]


HH = "\n\nHuman: Can you help?\n\nAssistant: Of course.\n\nHuman: With a poem?\n\nAssistant:{}"


def test_hh_is_split_at_the_last_assistant_turn_and_made_messages():
    row = {"chosen": HH.format(" Gladly.\n\nRoses are red."), "rejected": HH.format(" No.")}
    prompt = [user("Can you help?"), assistant("Of course."), user("With a poem?")]
    assert to_records(row, "hh", PAIRS) == [Record(prompt, ("Gladly.\n\nRoses are red.", "No."))]


def test_hh_for_a_model_without_template_stays_plain_text():
    row = {"chosen": HH.format(" Gladly."), "rejected": HH.format(" No.")}
    assert to_records(row, "hh", PAIRS, chat=False) == [Record(HH.format(""), (" Gladly.", " No."))]


def test_hh_with_the_prompt_in_a_column_of_its_own_or_repeated_is_the_same():
    whole = {"chosen": HH.format(" Gladly."), "rejected": HH.format(" No.")}
    parts = {"prompt": HH.format(""), "chosen": " Gladly.", "rejected": " No."}
    repeated = {"prompt": HH.format(""), **whole}
    expected = to_records(whole, "hh", PAIRS)
    assert to_records(parts, "hh", PAIRS) == to_records(repeated, "hh", PAIRS) == expected


def test_hh_rows_that_diverge_before_the_last_turn_are_dropped():
    row = {"chosen": HH.format(" yes"), "rejected": HH.format(" no").replace("poem", "song")}
    assert reason(row, "hh") == "chosen and rejected do not share their prompt"
    row = {"chosen": HH.format(" yes\n\nHuman: Thanks"), "rejected": HH.format(" no")}
    assert reason(row, "hh") == "the conversation does not end with the assistant's turn"


def test_message_pairs_that_diverge_before_the_last_turn_are_dropped():
    row = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("x"), user("c"), assistant("y")],
    }
    assert reason(row) == "chosen and rejected do not share their prompt"


def test_what_each_kind_takes_from_a_pair():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert to_records(row, "preference", RESPONSES) == [Record("p", ("c",))]
    assert to_records(row, "preference", PROMPTS) == [Record("p", ())]
    assert to_records(row, "preference", UNPAIRED) == [Record("p", ("c",), True), Record("p", ("r",), False)]


def test_reversal_swaps_the_pair_in_every_kind():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert to_records(row, "preference", PAIRS, reverse=True) == [Record("p", ("r", "c"))]
    assert to_records(row, "preference", RESPONSES, reverse=True) == [Record("p", ("r",))]
    assert to_records(row, "preference", UNPAIRED, reverse=True) == [Record("p", ("r",)), Record("p", ("c",), False)]


def test_unpaired_rows_keep_their_label_and_give_responses_only_when_desirable():
    good, bad = ({"prompt": "p", "completion": "c", "label": label} for label in (True, 0))
    assert to_records(bad, "unpaired", UNPAIRED) == [Record("p", ("c",), False)]
    assert to_records(bad, "unpaired", UNPAIRED, reverse=True) == [Record("p", ("c",), True)]
    assert to_records(good, "unpaired", RESPONSES) == [Record("p", ("c",))]
    assert to_records(bad, "unpaired", RESPONSES) == []
    assert to_records(bad, "unpaired", PROMPTS) == [Record("p", ())]


NO_ANSWER = "the conversation does not end with the assistant's turn"
MIXED = "one of chosen and rejected is a string, the other messages"
NO_TEXT = "the content of a message is not a string"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": " \n", "rejected": "r"}, "empty response"),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, "empty response"),
        ({"prompt": "  ", "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"prompt": [], "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": None, "rejected": "c"}, "chosen or rejected is missing"),
        ({"prompt": None, "chosen": [assistant("c")], "rejected": [assistant("r")]}, "no prompt"),
        ({"prompt": "p", "chosen": [user("p")], "rejected": [user("p")]}, NO_ANSWER),
        ({"prompt": "p", "chosen": "c", "rejected": [assistant("r")]}, MIXED),
        ({"prompt": "p", "chosen": [{"role": "critic", "content": "c"}], "rejected": []}, "unknown role 'critic'"),
        ({"prompt": "p", "chosen": [{"role": "assistant", "content": None}], "rejected": []}, NO_TEXT),
        ({"prompt": "p", "chosen": 3, "rejected": 4}, "a conversation is not a list of messages"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_say_why(row, expected):
    assert reason(row) == expected


def test_a_prompt_that_ends_with_the_assistant_is_no_prompt():
    assert (
        reason({"prompt": [user("a"), assistant("b")]}, "prompts", PROMPTS)
        == "the prompt ends with the assistant's turn"
    )


CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}
TOOLS = [{"type": "function", "function": {"name": "rain"}}]


def test_every_key_of_a_message_is_kept_but_those_that_only_other_rows_have():
    prompt = [
        {**user("Rain?"), "tool_calls": None, "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}], "reasoning_content": "Look."},
        {"role": "tool", "content": "0 mm", "tool_call_id": "c1", "tool_calls": []},
    ]
    row = {"prompt": prompt, "chosen": "No.", "rejected": "Yes."}
    assert to_records(row, "preference", PAIRS)[0].prompt == [
        {**user("Rain?"), "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Look."},
        {"role": "tool", "content": "0 mm", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({**assistant("4"), "weight": 1.0}, "4"),
        ({**assistant("4"), "reasoning_content": None}, "4"),
        ({**assistant("4"), "reasoning_content": "2 + 2"}, {**assistant("4"), "reasoning_content": "2 + 2"}),
        ({"role": "assistant", "tool_calls": [CALL]}, {**assistant(""), "tool_calls": [CALL]}),
        ({"role": "assistant", "function_call": CALL["function"]}, {**assistant(""), "tool_calls": [CALL]}),
    ],
)
def test_an_answer_is_its_text_or_the_whole_message_when_it_says_more(message, answer):
    row = {"messages": [user("q"), message]}
    assert to_records(row, "demonstrations", RESPONSES) == [Record([user("q")], (answer,))]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "prompter", "value": "a"}, user("a")),
        ({"role": "User", "content": "a"}, user("a")),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "function", "name": "rain", "content": "a"}, {"role": "tool", "name": "rain", "content": "a"}),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}]}, user("ab")),
        (
            {"from": "function_call", "value": '{"name": "rain", "arguments": {"town": "Ulm"}}'},
            {**assistant(""), "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
            {**assistant(""), "tool_calls": [CALL]},
        ),
    ],
)
def test_roles_and_contents_as_others_write_them(turn, expected):
    row = {"prompt": [user("q"), turn, user("z")]}
    assert to_records(row, "prompts", PROMPTS)[0].prompt[1] == expected


@pytest.mark.parametrize("role", ["bot", "model", "gpt", "ai", "Assistant"])
def test_the_assistant_by_other_names(role):
    row = {"messages": [user("q"), {"role": role, "content": "a"}]}
    assert to_records(row, "demonstrations", RESPONSES)[0].responses == ("a",)


TURNS = [user("Is it?"), assistant("It's so.")]


@pytest.mark.parametrize("written", [json.dumps(TURNS), json.dumps(TURNS, indent=1), repr(TURNS)])
def test_a_conversation_as_text_is_that_conversation(written):
    as_text = {"chosen": written, "rejected": written.replace("so", "not so")}
    record = Record(TURNS[:1], ("It's so.", "It's not so."))
    assert to_records(as_text, "preference", PAIRS) == [record]
    assert to_records({"messages": written}, "demonstrations", RESPONSES) == [Record(TURNS[:1], ("It's so.",))]
    assert to_records({"prompt": json.dumps(TURNS[:1])}, "prompts", PROMPTS) == [Record(TURNS[:1], ())]


@pytest.mark.parametrize(
    "text",
    [
        '{"from": "Ulm", "value": 3}',
        '[{"from": "Ulm", "to": "Bonn"}]',
        '["user", "role"]',
        '{"role": "user"}',
        "[see 'from']",
    ],
)
def test_other_json_is_the_text_it_is(text):
    row = {"prompt": text, "completion": text}
    assert to_records(row, "demonstrations", RESPONSES) == [Record(text, (text,))]


@pytest.mark.parametrize(
    ("prompt", "context", "expected"),
    [
        ("q", {"system": "S"}, [{"role": "system", "content": "S"}, user("q")]),
        ("q", {"system": " "}, "q"),
        ("q", {"system": None, "history": []}, "q"),
        ("q", {"history": [["a", "b"]]}, [user("a"), assistant("b"), user("q")]),
        ("q", {"history": '[["a", "b"]]'}, [user("a"), assistant("b"), user("q")]),
        ("q", {"history": [user("a"), assistant("b")]}, [user("a"), assistant("b"), user("q")]),
        ([user("q")], {"system": "S"}, [{"role": "system", "content": "S"}, user("q")]),
        (
            [{"role": "system", "content": "S\n"}, user("q")],
            {"system": "S", "history": [["a", "b"]]},
            [{"role": "system", "content": "S\n"}, user("a"), assistant("b"), user("q")],
        ),
        (
            [user("a"), assistant("b"), user("q")],
            {"history": [["a", "b"]], "system": "S"},
            [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("q")],
        ),
    ],
)
def test_system_and_history_open_the_conversation_once(prompt, context, expected):
    assert to_records({"prompt": prompt, **context}, "prompts", PROMPTS) == [Record(expected, ())]


@pytest.mark.parametrize(
    ("written", "tools"),
    [
        (TOOLS, TOOLS),
        (json.dumps(TOOLS), TOOLS),
        (json.dumps(TOOLS[0]), TOOLS),
        ([json.dumps(TOOLS[0])], TOOLS),
        ([{**TOOLS[0], "strict": None}], TOOLS),
        (None, None),
        ("", None),
        ("[]", None),
        ([], None),
    ],
)
def test_tools_reach_the_record(written, tools):
    row = {"prompt": "q", "completion": "a", "tools": written}
    assert to_records(row, "demonstrations", RESPONSES) == [Record("q", ("a",), tools=tools)]


def test_final_text_is_marked_and_stays_as_it_is():
    row = {"chosen": HH.format(" Gladly."), "rejected": HH.format(" No.")}
    expected = Record(HH.format(""), (" Gladly.", " No."), templated=True)
    assert to_records(row, "hh", PAIRS, templated=True) == [expected]
    row = {"messages": TURNS}
    assert reason(row, "demonstrations", RESPONSES, templated=True).startswith("`templated` says")


QUESTION = [{"from": "human", "value": "q"}]


@pytest.mark.parametrize("form", [lambda text: {"from": "gpt", "value": text}, lambda text: [assistant(text)], str])
def test_sharegpt_ranking_the_conversation_is_the_prompt_of_one_answer(form):
    row = {"messages": QUESTION, "chosen": form("good"), "rejected": form("bad")}
    assert to_records(row, "preference", PAIRS) == [Record([user("q")], ("good", "bad"))]


@pytest.mark.parametrize("rejected", ["bad", [assistant("bad")], assistant("bad"), [user("q"), assistant("bad")]])
def test_a_conversation_that_ends_with_the_chosen_answer(rejected):
    row = {"messages": [user("q"), assistant("good")], "rejected": rejected}
    assert to_records(row, "preference", PAIRS) == [Record([user("q")], ("good", "bad"))]


def test_an_unpaired_conversation_ends_with_the_completion():
    row = {"messages": [user("q"), assistant("a")], "label": False}
    assert to_records(row, "unpaired", UNPAIRED) == [Record([user("q")], ("a",), label=False)]


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (1, True), (1.0, True), ("True", True), ("1", True), (False, False), (0, False), (-1, False),
     (-1.0, False), ("false", False), ("-1", False), (" 0 ", False)],
)  # fmt: skip
def test_labels_as_others_write_them(label, desirable):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert to_records(row, "unpaired", UNPAIRED) == [Record("p", ("c",), label=desirable)]


@pytest.mark.parametrize("label", [None, 2, 0.5, "good", "", [True]])
def test_a_value_that_is_no_label_is_refused_alike_whatever_it_is(label):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert reason(row, "unpaired", UNPAIRED) == "the label is none of true, false, 1, 0, -1"


@pytest.mark.parametrize(
    ("answers", "pair"),
    [
        ({"response_0": "a", "response_1": "b", "preferred": 1}, ("b", "a")),
        ({"response_1": "a", "response_2": "b", "preferred": "1"}, ("a", "b")),
        ({"response_a": "a", "response_b": "b", "preferred": "model_b"}, ("b", "a")),
        ({"response_0": "a", "response_1": "b", "score_0": 0.5, "score_1": -1}, ("a", "b")),
        ({"response_0": "a", "response_1": "b", "response_2": None, "preferred": 0.0}, ("a", "b")),
        ({"responses": ["a", "b"], "preferred": 1}, ("b", "a")),
        ({"responses": ["a", "b", "c"], "scores": [2, 3, 1]}, ("b", "c")),
        ({"responses": ["a", "b", "c", "d"], "scores": [3, 1, 1, 3]}, ("a", "b")),
        ({"responses": [{"response": "a", "score": "4.5"}, {"content": "b", "score": "5"}]}, ("b", "a")),
        ({"responses": [{**assistant("a"), "score": 1}, {**assistant("b"), "score": 2}]}, ("b", "a")),
    ],
)
def test_the_best_answer_against_the_worst(answers, pair):
    assert to_records({"prompt": "p", **answers}, "preference", PAIRS) == [Record("p", pair)]
    assert to_records({"prompt": "p", **answers}, "preference", PAIRS, reverse=True) == [Record("p", pair[::-1])]


def test_answers_of_one_score_still_have_a_prompt():
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}
    assert to_records(row, "preference", PROMPTS) == [Record("p", ())]


NUMBERED = {"prompt": "p", "response_0": "a", "response_1": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1.0]}, "the answers have the same score"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores and responses are not lists of one length"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, "N/A"]}, "a score is not a number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "a score is not a number"),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, "there are fewer than two answers"),
        ({**NUMBERED, "preferred": "tie (both bad)"}, "the answers are tied"),
        ({**NUMBERED, "preferred": 2}, "preferred 2 does not choose one of two answers (0, 1)"),
        ({**NUMBERED, "preferred": None}, "preferred None does not choose one of two answers (0, 1)"),
        ({**NUMBERED, "preferred": True}, "preferred True does not choose one of two answers (0, 1)"),
        ({"prompt": "p", "responses": [{"x": 1, "score": 1}, {"x": 2, "score": 2}]},
         "an answer has none of the keys response, content, text, answer, completion, output; it has x, score"),
        ({"prompt": "p", "system": "S", "chosen": [{"role": "system", "content": "T"}, user("p"), assistant("c")],
          "rejected": [{"role": "system", "content": "T"}, user("p"), assistant("r")]},
         "system is not the system turn that the conversation has"),
        ({"prompt": "", "system": "S", "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"prompt": "p", "system": 3, "chosen": "c", "rejected": "r"}, "system is not text"),
        ({"prompt": "p", "history": "a: b", "chosen": "c", "rejected": "r"}, "history is not a list of turns"),
        ({"prompt": "p", "history": [["a"]], "chosen": "c", "rejected": "r"},
         "a turn of history is not a pair of texts"),
        ({"prompt": "p", "tools": "rain", "chosen": "c", "rejected": "r"},
         "tools is neither a list of mappings nor JSON text of one"),
        ({"prompt": [user([{"type": "image_url", "text": None}])], "chosen": "c", "rejected": "r"},
         "a message has content of type 'image_url', and only text can be used"),
        ({"prompt": [{**user("p"), "images": ["a.png"]}], "chosen": "c", "rejected": "r"},
         "a message holds images, and only text can be used"),
        ({"prompt": [{"answer": "x", "score": 1}], "chosen": "c", "rejected": "r"},
         "a message has no role; its keys are answer, score"),
        ({"prompt": [{"from": "function_call", "value": "rain()"}], "chosen": "c", "rejected": "r"},
         "a function call is not JSON with name and arguments"),
        ({"prompt": '[{"role": "user", "content": "Is', "chosen": "c", "rejected": "r"},
         "a text begins like a conversation in JSON, and does not parse as one"),
        ({"prompt": "p", "input": ["q"], "chosen": "c", "rejected": "r"}, "prompt and input are not both text"),
        ({"chosen": HH.format(" yes"), "rejected": HH.format(" no")}, "chosen is an HH string, and most rows are not"),
    ],
)  # fmt: skip
def test_rows_of_the_wider_layouts_that_cannot_be_used_say_why(row, expected):
    assert reason(row) == expected


def test_ids_of_turns_do_not_make_two_prompts_of_one():
    chosen = [{**user("q"), "id": 1}, assistant("good")]
    rejected = [{**user("q"), "id": 2}, assistant("bad")]
    assert to_records({"chosen": chosen, "rejected": rejected}, "preference", PAIRS) == [
        Record([{**user("q"), "id": 1}], ("good", "bad"))
    ]


def test_a_row_without_a_prompt_where_others_have_one_is_given_none():
    assert reason({"prompt": None, "chosen": "Sure! Yes.", "rejected": "Sure! No."}) == "no prompt"


def test_a_history_that_holds_the_question_says_it_once_and_another_is_refused():
    row = {"prompt": "And 7?", "completion": "Yes.", "history": [{"role": "user", "content": "And 7?"}]}
    [record] = to_records(row, "demonstrations", DataKind.RESPONSES)
    assert record.prompt == [{"role": "user", "content": "And 7?"}]
    other = {**row, "history": [{"role": "user", "content": "And 6?"}]}
    assert reason(other, "demonstrations", DataKind.RESPONSES).startswith("history ends with a turn of the user")


def test_hh_prompts_of_other_layouts_are_conversations_too():
    row = {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "completion": " Yes."}
    [record] = to_records(row, "demonstrations", DataKind.RESPONSES)
    assert (record.prompt, record.responses) == ([{"role": "user", "content": "Is it?"}], ("Yes.",))
    [plain] = to_records(row, "demonstrations", DataKind.RESPONSES, chat=False)
    assert plain.prompt == row["prompt"]


def test_two_ways_to_call_in_one_message_are_refused():
    call = {"name": "f", "arguments": {}}
    turn = {"role": "assistant", "content": "", "function_call": call, "tool_calls": [{"function": call}]}
    row = {"messages": [{"role": "user", "content": "q"}, turn]}
    assert reason(row, "demonstrations", DataKind.RESPONSES) == "a message has function_call and tool_calls"


def test_a_score_too_large_for_a_number_is_none():
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [10**400, 1]}
    assert reason(row) == "a score is not a number"
