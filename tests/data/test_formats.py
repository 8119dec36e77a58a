"""Which columns a source has and what they make."""

import pytest
from datasets import Dataset

from aligndistil.batch import DataKind
from aligndistil.data.formats import check_feeds, find_columns, find_format
from aligndistil.errors import UserError
from aligndistil.recipe import Source


def detect(row, **options):
    rows, source = Dataset.from_list([row]), Source(path="rows.jsonl", **options)
    return find_format(source, find_columns(source, rows.column_names), rows)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r", "messages": [], "score": 1.0}, "preference"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "hh"),
        ({"prompt": "p", "completion": "c", "label": True}, "unpaired"),
        ({"prompt": "p", "completion": "c"}, "demonstrations"),
        ({"conversations": [{"from": "human", "value": "p"}]}, "demonstrations"),
        ({"prompt": "p", "category": "x"}, "prompts"),
    ],
)
def test_the_columns_show_the_format(row, expected):
    assert detect(row) == expected


def test_hh_with_the_prompt_in_a_column_of_its_own_can_be_named():
    assert detect({"prompt": "p", "chosen": "c", "rejected": "r"}, format="hh") == "hh"


def test_columns_that_make_nothing_are_listed_with_the_known_formats():
    with pytest.raises(UserError, match=r"\[instruction, output\] make no known format \(preference: chosen\+rejected"):
        detect({"instruction": "p", "output": "c"})


def test_a_mapping_gives_columns_our_names():
    row = {"instruction": "p", "output": "c"}
    assert detect(row, columns={"prompt": "instruction", "completion": "output"}) == "demonstrations"
    with pytest.raises(UserError, match=r"columns\.prompt names 'instructions', which is not there; .*'instruction'"):
        detect(row, columns={"prompt": "instructions"})
    with pytest.raises(UserError, match=r"columns\.question is none of prompt, chosen"):
        detect(row, columns={"question": "instruction"})


def test_a_named_format_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"format preference needs the columns chosen\+rejected, .* \[prompt\]"):
        detect({"prompt": "p"}, format="preference")


def test_rows_that_cannot_feed_the_objective_are_refused_with_those_that_can():
    source = Source(path="rows.jsonl")
    with pytest.raises(UserError, match=r"eats pairs, which demonstrations rows do not give; .* preference, hh"):
        check_feeds(source, "demonstrations", DataKind.PAIRS, reverse=False)
    with pytest.raises(UserError, match="cannot reverse demonstrations"):
        check_feeds(source, "demonstrations", DataKind.RESPONSES, reverse=True)
    check_feeds(source, "hh", DataKind.UNPAIRED, reverse=True)
