"""A data section becomes examples: kinds, reports, refusals, boundaries, mixtures, and the cache between."""

from pathlib import Path

import pytest

from aligndistil.batch import DataKind, Row, collate
from aligndistil.data import gives, load_examples
from aligndistil.errors import UserError
from aligndistil.recipe import Data

GOOD = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "no"} for i in range(20)]
STORE = Path(__file__).parents[3] / "shared" / "data"
MERGED = {"prompt": "the mus", "chosen": "ic", "rejected": "no"}
"""Without a template its boundary falls inside a token; see test_encoding."""


def load(tokenizer, *sources, kind=DataKind.PAIRS, which="train", seed=0, on_progress=None, **options):
    listed = [source if isinstance(source, dict) else {"path": source} for source in sources]
    section = Data.model_validate({"train": listed, "eval": listed, **options})
    return load_examples(section, which, kind, tokenizer, frozenset(), seed=seed, on_progress=on_progress)


def test_pairs_have_two_rows_chosen_first_and_share_their_prompt(qwen, write):
    path = write(GOOD)
    examples = load(qwen, path)
    chosen, rejected = examples.rows(3)
    assert qwen.decode(chosen.response_ids) == "It is 3.<|im_end|>"
    assert qwen.decode(rejected.response_ids) == "no<|im_end|>"
    assert chosen.prompt_ids == rejected.prompt_ids == examples.prompt_ids(3)
    assert (len(examples), examples.key(3)) == (20, f"{path}#train:4")
    assert collate(examples.rows(3), examples.kind, qwen.pad_token_id).examples == 1


def test_reversed_preferences_swap_the_rows(qwen, write):
    path = write(GOOD)
    assert load(qwen, path, reverse_preferences=True).rows(3) == load(qwen, path).rows(3)[::-1]


def test_other_kinds_have_one_row_from_the_same_file(qwen, write):
    path = write(GOOD)
    chosen, rejected = load(qwen, path).rows(0)
    assert load(qwen, path, kind=DataKind.RESPONSES).rows(0) == [chosen]
    assert load(qwen, path, kind=DataKind.RESPONSES, reverse_preferences=True).rows(0) == [rejected]
    assert load(qwen, path, kind=DataKind.PROMPTS).rows(0) == [Row(chosen.prompt_ids, [])]
    unpaired = load(qwen, path, kind=DataKind.UNPAIRED)
    assert len(unpaired) == 40
    assert [unpaired.rows(i)[0].label for i in (0, 1)] == [True, False]
    assert unpaired.rows(1)[0].response_ids == rejected.response_ids


def test_eval_is_its_own_part_of_the_section(qwen, write):
    assert len(load(qwen, write(GOOD), which="eval")) == 20
    with pytest.raises(ValueError, match=r"no data.eval"):
        load_examples(Data(train={"path": "x"}), "eval", DataKind.PAIRS, qwen, frozenset())


def test_rows_that_cannot_be_used_are_counted_with_reasons_and_numbers(qwen, write):
    rows = [*GOOD, {**GOOD[0], "chosen": ""}, {**GOOD[0], "rejected": "It is 0."}, {**GOOD[0], "rejected": " "}]
    report = load(qwen, write(rows), max_dropped_fraction=0.2).report
    assert (report.rows_read, report.used, report.dropped_count) == (23, 20, 3)
    assert {reason: (d.count, d.rows) for reason, d in report.dropped.items()} == {
        "empty response": (2, [21, 23]),
        "chosen and rejected are the same": (1, [22]),
    }
    assert (
        "3 dropped (13.0%): empty response: 2 (rows 21, 23); chosen and rejected are the same: 1 (rows 22)"
        in report.lines()
    )


def test_too_many_unusable_rows_are_refused_with_the_reasons(qwen, write):
    """Pain 6: nothing trains on empty responses."""
    rows = [*GOOD[:18], {**GOOD[0], "chosen": ""}, {**GOOD[0], "chosen": " "}]
    with pytest.raises(
        UserError, match=r"2 of 20 examples cannot be used, more than .*\(0.05\): empty response: 2 \(rows 19, 20\)"
    ):
        load(qwen, write(rows))


def test_a_source_without_a_usable_row_is_refused_whatever_is_allowed(qwen, write):
    with pytest.raises(UserError, match=r"1 of 1 examples fail alike: empty response; row 1"):
        load(qwen, write([{**GOOD[0], "chosen": ""}]), max_dropped_fraction=1.0)
    undesirable = [{"prompt": "p", "completion": "c", "label": False}]
    with pytest.raises(UserError, match="no example is left, since no row is desirable"):
        load(qwen, write(undesirable), kind=DataKind.RESPONSES)


def test_undesirable_rows_are_left_out_of_responses_without_counting_as_faults(qwen, write):
    rows = [{"prompt": "p", "completion": f"c{i}", "label": i % 2 == 0} for i in range(10)]
    report = load(qwen, write(rows), kind=DataKind.RESPONSES).report
    assert (report.used, report.left_out, report.dropped_count) == (5, 5, 0)


def test_a_bad_source_is_not_hidden_in_a_mixture(qwen, write):
    good = write(GOOD * 10, "good.jsonl")
    bad = write([GOOD[0], {**GOOD[0], "chosen": ""}], "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        load(qwen, good, bad)


def test_truncations_are_counted(qwen, write):
    rows = [*GOOD[:3], {"prompt": "What is it? " * 30, "chosen": "yes " * 40, "rejected": "no " * 40}]
    examples = load(qwen, write(rows), max_prompt_length=40, max_response_length=20)
    assert (examples.report.truncated_prompts, examples.report.truncated_responses) == (1, 2)
    assert [len(row.response_ids) for row in examples.rows(3)] == [20, 20]
    assert len(examples.prompt_ids(3)) == 40


def test_more_mismatched_boundaries_than_tolerated_are_refused_naming_rows(plain, write):
    """Pain 4."""
    path = write([{**GOOD[0], "prompt": "Q\n"}, MERGED, {**GOOD[1], "prompt": "Q\n"}])
    with pytest.raises(
        UserError, match=r"not the first tokens of the whole row: 1 \(rows 2\) of 3.*on_boundary_mismatch"
    ):
        load(plain, path)


def test_mismatched_boundaries_can_be_shifted_or_dropped(plain, write):
    path = write([*({**row, "prompt": "Q\n"} for row in GOOD), MERGED])
    shifted = load(plain, path, on_boundary_mismatch="shift")
    assert (len(shifted), shifted.report.shifted) == (21, 1)
    assert [plain.decode([*row.prompt_ids, *row.response_ids]) for row in shifted.rows(20)] == [
        "the music<|endoftext|>",
        "the musno<|endoftext|>",
    ]
    dropped = load(plain, path, on_boundary_mismatch="drop")
    assert (len(dropped), dropped.report.shifted, dropped.report.dropped_count) == (20, 0, 1)
    assert [dropped.key(i) for i in range(20)] == [f"{path}#train:{i + 1}" for i in range(20)]


def test_one_mismatch_in_a_thousand_is_shifted_and_counted(plain, write):
    rows = [{"prompt": "Q\n", "chosen": f"yes {i}", "rejected": "no"} for i in range(999)]
    assert load(plain, write([*rows, MERGED])).report.shifted == 1


def test_a_prompt_alone_has_no_boundary_to_miss(plain, write):
    assert len(load(plain, write([MERGED]), kind=DataKind.PROMPTS)) == 1


def test_one_file_read_in_two_ways_is_two_sources(qwen, write):
    path = write([{**row, "best": f"{row['chosen']} indeed"} for row in GOOD])
    other = {"path": path, "columns": {"chosen": "best"}}
    examples = load(qwen, path, other, other)
    keys = [examples.key(i) for i in range(len(examples))]
    assert len(set(keys)) == len(keys) == 60
    assert keys[0] == f"{path}#train:1"
    assert keys[20] == f"{path}#train(2):1"
    assert keys[40] == f"{path}#train(3):1"


def test_weights_repeat_and_sub_sample_sources(qwen, write):
    one, two = write(GOOD, "one.jsonl"), write(GOOD[:10], "two.jsonl")
    mixed = load(qwen, {"path": one, "weight": 0.25}, {"path": two, "weight": 2.5})
    keys = [mixed.key(i) for i in range(len(mixed))]
    from_one = [key for key in keys if key.startswith(one)]
    from_two = [key for key in keys if key.startswith(two)]
    assert (len(from_one), len(set(from_one))) == (5, 5)
    assert (len(from_two), len(set(from_two))) == (25, 10)
    assert {from_two.count(key) for key in from_two} == {2, 3}


def test_sub_sampling_follows_the_seed_and_nothing_else(qwen, write):
    path = write(GOOD)

    def keys(seed):
        mixed = load(qwen, {"path": path, "weight": 0.25}, seed=seed)
        return [mixed.key(i) for i in range(len(mixed))]

    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    assert len(load(qwen, {"path": path, "weight": 0.001})) == 1


def test_one_source_may_hold_strings_and_the_other_messages(qwen, write):
    messages = [
        {"chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
         "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]}
        for row in GOOD
    ]  # fmt: skip
    mixed = load(qwen, write(GOOD, "strings.jsonl"), write(messages, "messages.jsonl"))
    assert [mixed.rows(i) for i in range(20)] == [mixed.rows(20 + i) for i in range(20)]


def test_columns_of_another_name_are_mapped(qwen, write):
    renamed = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in GOOD]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    mapped = load(qwen, {"path": write(renamed, "renamed.jsonl"), "columns": columns})
    assert mapped.rows(7) == load(qwen, write(GOOD)).rows(7)


def test_what_was_encoded_once_is_read_the_second_time(qwen, write):
    path, told = write(GOOD), []
    first = load(qwen, path, on_progress=lambda *progress: told.append(progress))
    assert told == [(20, 20)]
    second = load(qwen, path, on_progress=lambda *progress: told.append(progress))
    assert len(told) == 1
    assert [second.rows(i) for i in range(20)] == [first.rows(i) for i in range(20)]
    assert second.report == first.report


def test_progress_counts_on_over_sources(qwen, write):
    told = []
    one, two = write(GOOD, "one.jsonl"), write(GOOD[:5], "two.jsonl")
    load(qwen, one, two, on_progress=lambda *progress: told.append(progress))
    assert told == [(20, 20), (25, 25)]


@pytest.mark.parametrize(
    "change",
    [{"reverse_preferences": True}, {"max_prompt_length": 9}, {"max_response_length": 9}, {"kind": DataKind.PROMPTS}],
)
def test_whatever_changes_the_tokens_is_encoded_again(qwen, write, change):
    path, told = write(GOOD), []
    load(qwen, path)
    load(qwen, path, on_progress=lambda *progress: told.append(progress), **change)
    assert told


def test_a_file_that_changes_while_it_is_encoded_is_kept_under_what_it_held(qwen, write):
    path = write(GOOD)
    assert len(load(qwen, path, on_progress=lambda *_: write(GOOD[:3]))) == 20
    assert len(load(qwen, path)) == 3
    write(GOOD)
    told = []
    assert len(load(qwen, path, on_progress=lambda *progress: told.append(progress))) == 20
    assert told == []  # what was stored is what the file holds now, not what it held for a moment


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"limit": 3}, {"limit": 4}),
        ({}, {"columns": {"chosen": "rejected", "rejected": "chosen"}}),
        ({}, {"templated": True}),
        ({}, {"format": "prompts"}),
        ({"split": "train[:5]"}, {"split": "train[5:10]"}),
    ],
)
def test_how_a_source_is_read_is_part_of_what_its_tokens_are_kept_under(qwen, write, one, other):
    path = write(GOOD)
    kind = DataKind.PROMPTS if "format" in other else DataKind.PAIRS
    told = []
    for change in (one, other):
        load(qwen, {"path": path, **change}, kind=kind, on_progress=lambda *progress: told.append(progress))
    assert len(told) == 2


def test_a_file_that_changes_is_encoded_again(qwen, write):
    before = load(qwen, write(GOOD))
    after = load(qwen, write(GOOD[1:]))
    assert (len(before), len(after)) == (20, 19)


def test_the_boundary_policy_reads_the_same_cache(plain, write):
    path, told = write([{**GOOD[0], "prompt": "Q\n"}, MERGED]), []
    load(plain, path, on_boundary_mismatch="shift")
    load(plain, path, on_boundary_mismatch="drop", max_dropped_fraction=1.0, on_progress=lambda *p: told.append(p))
    assert not told


def test_whether_a_section_gives_a_kind_is_known_without_encoding(write):
    pairs, demonstrations = (
        write(GOOD, "pairs.jsonl"),
        write([{"prompt": "p", "completion": "c"}], "demonstrations.jsonl"),
    )
    section = Data.model_validate({"train": {"path": pairs}, "eval": [{"path": pairs}, {"path": demonstrations}]})
    assert gives(section, "train", DataKind.PAIRS)
    assert gives(section, "eval", DataKind.RESPONSES)
    assert not gives(section, "eval", DataKind.PAIRS)


@pytest.mark.skipif(not STORE.is_dir(), reason="the real preference data are not here")
@pytest.mark.parametrize(("name", "rows"), [("alpaca_prefs.test.jsonl.gz", 700), ("hh_harmless.jsonl.gz", 1800)])
def test_real_preferences_are_read_whole(qwen, name, rows):
    examples = load(qwen, str(STORE / name), max_prompt_length=4096, max_response_length=4096)
    assert examples.report.used >= rows
    assert (examples.report.dropped_count, examples.report.shifted) == (0, 0)
    for index in (0, len(examples) // 2, len(examples) - 1):
        for row in examples.rows(index):
            assert row.response_ids[-1] == qwen.eos_token_id
            assert qwen.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
