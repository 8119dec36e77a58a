"""Raw rows of every shape peers' data sets have, and the reasons for which one is dropped."""

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
    assert (
        reason({"prompt": "p", "completion": "c", "label": None}, "unpaired", UNPAIRED) == "label is not true or false"
    )


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
