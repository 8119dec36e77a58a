"""What a set of examples is refused for, or what is said of it, although each of its rows is right."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from aligndistil.batch import DataKind
from aligndistil.data import Examples, eval_prompts, load_examples
from aligndistil.data.dataset import is_held_out
from aligndistil.data.encoded_source import prompt_hash
from aligndistil.errors import UserError
from aligndistil.recipe import Data
from aligndistil.recipe.sections import HeldOut

Rows = list[dict[str, Any]]
Write = Callable[..., str]


def pairs(count: int) -> Rows:
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Not {i}."} for i in range(count)]


def labelled(*labels: bool) -> Rows:
    return [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": label} for i, label in enumerate(labels)]


def load(tokenizer: Any, train: Any, kind: DataKind = DataKind.PAIRS, which: Any = "train", **options: Any) -> Examples:
    section = Data.model_validate({"train": train, **options})
    return load_examples(section, which, kind, tokenizer, frozenset())


def prompts(examples: Examples, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(examples.prompt_ids(i)) for i in range(len(examples))]


SWAPPED = {"prompt": "What is 1?", "chosen": "Not 1.", "rejected": "It is 1."}
OTHER_ANSWER = {"prompt": "What is 1?", "chosen": "It is 2.", "rejected": "Not 1."}


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (pairs(6), DataKind.PAIRS, []),
        ([*pairs(6), pairs(6)[2], pairs(6)[2]], DataKind.PAIRS, ["2 of 8 examples repeat an earlier one (#7 is #3)"]),
        ([*pairs(6), OTHER_ANSWER], DataKind.PAIRS, []),
        (
            [*pairs(6), SWAPPED],
            DataKind.PAIRS,
            ["1 pair(s) stand in the data both ways round: what is chosen in #2 is rejected in #7"],
        ),
        (
            [*pairs(6), SWAPPED, SWAPPED],
            DataKind.PAIRS,
            [
                "1 of 8 examples repeat an earlier one (#8 is #7)",
                "1 pair(s) stand in the data both ways round: what is chosen in #2 is rejected in #7",
            ],
        ),
        (
            [{**row, "rejected": "no"} for row in pairs(6)],
            DataKind.PAIRS,
            ["6 of 6 examples have the same rejected response"],
        ),
        (
            [{**row, "chosen": "yes"} for row in pairs(4)] + pairs(2),
            DataKind.PAIRS,
            ["4 of 6 examples have the same chosen response"],
        ),
        ([{**row, "chosen": "yes"} for row in pairs(3)] + pairs(6)[3:], DataKind.PAIRS, []),
        (pairs(1), DataKind.PAIRS, []),
        ([*pairs(6), SWAPPED], DataKind.RESPONSES, []),
        ([*pairs(6), OTHER_ANSWER], DataKind.PROMPTS, ["1 of 7 examples repeat an earlier one (#7 is #2)"]),
        (labelled(True, False, True), DataKind.UNPAIRED, []),
        (
            [*labelled(True, False, True), {**labelled(True)[0], "label": False}],
            DataKind.UNPAIRED,
            ["1 response(s) are labelled both desirable and undesirable (#1 and #4)"],
        ),
        (
            [*labelled(True, False, True), labelled(True)[0]],
            DataKind.UNPAIRED,
            ["1 of 4 examples repeat an earlier one (#4 is #1)"],
        ),
    ],
)
def test_what_is_odd_is_said_once_with_an_example_of_it(
    qwen: Any, write: Write, rows: Rows, kind: DataKind, said: list[str]
) -> None:
    notes = load(qwen, {"path": write(rows)}, kind).report.notes
    assert [re.sub(r"[^\s(]*#train:", "#", note) for note in notes] == said


def test_what_repeats_over_two_sources_is_seen_and_weights_repeat_nothing(qwen: Any, write: Write) -> None:
    one, two = write(pairs(4), "one.jsonl"), write(pairs(6)[3:], "two.jsonl")
    (note,) = load(qwen, [{"path": one, "weight": 3}, {"path": two}]).report.notes
    assert note == f"1 of 7 examples repeat an earlier one ({two}#train:1 is {one}#train:4)"


@pytest.mark.parametrize(
    ("labels", "all_of"), [((True, True, True), "desirable"), ((False, False), "undesirable"), ((True,), "desirable")]
)
def test_unpaired_data_of_one_label_are_refused(qwen: Any, write: Write, labels: tuple[bool, ...], all_of: str) -> None:
    source = {"path": write(labelled(*labels))}
    with pytest.raises(UserError, match=f"data.train: all {len(labels)} examples are {all_of} and none is "):
        load(qwen, source, DataKind.UNPAIRED)
    # Neither data to evaluate on nor another objective needs both.
    assert len(load(qwen, source, DataKind.UNPAIRED, "eval", eval=source)) == len(labels)
    assert len(load(qwen, source, DataKind.PROMPTS)) == len(labels)


def test_two_sources_of_one_label_each_make_a_set_of_both(qwen: Any, write: Write) -> None:
    good, bad = write(labelled(True, True), "good.jsonl"), write(labelled(False), "bad.jsonl")
    assert len(load(qwen, [{"path": good}, {"path": bad}], DataKind.UNPAIRED)) == 3
    assert len(load(qwen, {"path": write(pairs(1))}, DataKind.UNPAIRED)) == 2


@pytest.mark.parametrize("kind", DataKind)
def test_no_prompt_is_on_both_sides_and_together_they_are_all(qwen: Any, write: Write, kind: DataKind) -> None:
    rows = [{**row, "chosen": f"{row['chosen']} Take {take}."} for row in pairs(60) for take in range(3)]
    held = {"fraction": 0.3, "seed": 4}
    sides = [load(qwen, {"path": write(rows)}, kind, which, eval=held) for which in ("train", "eval")]
    trained, evaluated = (set(prompts(side, qwen)) for side in sides)
    assert not trained & evaluated
    assert len(trained | evaluated) == 60
    assert 8 <= len(evaluated) <= 28
    assert [side.report.held_out for side in sides] == [len(side) for side in reversed(sides)]
    assert sides[0].report.lines()[1] == f"{len(sides[1])} examples on the other side of data.eval.fraction"


def test_which_prompts_are_held_out_depends_on_seed_and_text_alone(qwen: Any, plain: Any, write: Write) -> None:
    held = {"fraction": 0.25, "seed": 1}

    def evaluated(tokenizer: Any, rows: Rows, **options: Any) -> set[str]:
        examples = load(tokenizer, {"path": write(rows)}, which="eval", **{"eval": held, **options})
        return {re.findall(r"\d+", prompt)[-1] for prompt in prompts(examples, tokenizer)}

    chosen = evaluated(qwen, pairs(80))
    shuffled = random.Random(0).sample(pairs(80), 80)
    as_messages = [{**row, "prompt": [{"role": "user", "content": f" {row['prompt']}\n"}]} for row in shuffled]
    assert chosen
    assert evaluated(qwen, shuffled) == evaluated(qwen, as_messages) == chosen
    assert evaluated(plain, [{**row, "prompt": f"{row['prompt']}\n"} for row in shuffled]) == chosen
    assert {prompt for prompt in chosen if int(prompt) < 40} == evaluated(qwen, pairs(40))
    assert evaluated(qwen, pairs(80), max_prompt_length=16) == chosen
    assert evaluated(qwen, pairs(80), eval={**held, "seed": 2}) != chosen
    assert evaluated(qwen, pairs(80), eval={**held, "fraction": 0.5}) > chosen


def test_held_out_prompts_are_those_that_a_judge_asks(qwen: Any, write: Write) -> None:
    section = Data.model_validate({"train": {"path": write(pairs(50))}, "eval": {"fraction": 0.2}})
    asked = [record.prompt for record in eval_prompts(section)]
    examples = load_examples(section, "eval", DataKind.PROMPTS, qwen, frozenset())
    assert asked
    assert [qwen.decode(examples.prompt_ids(i)).count(prompt) for i, prompt in enumerate(asked)] == [1] * len(examples)


def test_each_example_that_is_held_out_counts_once_whatever_the_weight(qwen: Any, write: Write) -> None:
    source = {"path": write(pairs(40)), "weight": 3}
    sides = [load(qwen, source, which=which, eval={"fraction": 0.25}) for which in ("train", "eval")]
    assert len(sides[1]) == len(set(prompts(sides[1], qwen))) == 40 - len(sides[0]) // 3


@pytest.mark.parametrize(("fraction", "which"), [(0.001, "eval"), (0.999, "train")])
def test_a_share_that_leaves_one_side_empty_is_refused(qwen: Any, write: Write, fraction: float, which: str) -> None:
    with pytest.raises(UserError, match=r"data\.eval\.fraction: .* of the 5 examples leaves none"):
        load(qwen, {"path": write(pairs(5))}, which=which, eval={"fraction": fraction})


def test_the_share_is_a_share_of_prompts_whatever_the_seed() -> None:
    for seed in (0, 1, 2, 2**40):
        held = sum(is_held_out(f"prompt {i}", HeldOut(fraction=0.1, seed=seed)) for i in range(4000))
        assert abs(held - 400) < 80, seed


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What?", [{"role": "user", "content": "What?"}], True),
        ("What?", " What?\n", True),
        ("\n\nHuman: What?\n\nAssistant:", [{"role": "user", "content": "What?"}], True),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))],
            True,
        ),
        ("What?", "what?", False),
        ("ab", [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], False),
    ],
)
def test_a_prompt_is_known_however_a_row_writes_it(one: Any, other: Any, same: bool) -> None:
    assert (prompt_hash(one) == prompt_hash(other)) is same


def test_examples_shared_with_others_are_counted_by_rows(qwen: Any, write: Write) -> None:
    train = load(qwen, {"path": write(pairs(10), "train.jsonl")})
    new = [{"prompt": f"Who is {i}?", "chosen": "Ann.", "rejected": "Bob."} for i in range(3)]
    half = {**pairs(1)[0], "chosen": "Another answer."}
    other = load(qwen, {"path": write([*new, *pairs(2), half, SWAPPED], "eval.jsonl")})
    assert other.shared_with(train) == 4
    assert train.shared_with(other) == 2


@pytest.mark.parametrize("broken", ["", "  "])
def test_rows_that_all_fail_alike_are_shown_and_no_limit_is_advised(qwen: Any, write: Write, broken: str) -> None:
    rows = [{"prompt": broken, "chosen": "a" * 500, "rejected": "b", "id": i} for i in range(12)]
    with pytest.raises(UserError) as refused:
        load(qwen, {"path": write(rows)})
    told = str(refused.value)
    assert "12 of 12 examples fail alike: empty prompt; row 1 has the columns" in told
    assert f'prompt: {json.dumps(broken)}, chosen: "{"a" * 20}' in told
    assert "max_dropped_fraction" not in told
    assert len(told) < 500


def test_rows_that_fail_for_several_reasons_may_be_allowed_for(qwen: Any, write: Write) -> None:
    rows = [*pairs(2), {**pairs(1)[0], "chosen": ""}, {**pairs(1)[0], "prompt": ""}]
    with pytest.raises(UserError, match=r"2 of 4 examples cannot be used, .*raise data\.max_dropped_fraction"):
        load(qwen, {"path": write(rows)})
    assert len(load(qwen, {"path": write(rows)}, max_dropped_fraction=0.5)) == 2


@pytest.mark.parametrize(("clean", "refused"), [(3, True), (998, True), (2000, False)])
def test_text_that_does_not_survive_the_template_is_refused_beyond_one_in_a_thousand(
    qwen: Any, write: Write, clean: int, refused: bool
) -> None:
    doubled = {"prompt": "<|im_start|>user\nWhat?<|im_end|>", "chosen": "It.", "rejected": "Not."}
    source = {"path": write([*pairs(clean), doubled])}
    if not refused:
        assert load(qwen, source).report.dropped_count == 1
        return
    with pytest.raises(UserError, match=rf"1 of {clean + 1} rows .*\(rows {clean + 1}\).*`templated: true`"):
        load(qwen, source, max_dropped_fraction=1.0)


def test_files_and_columns_that_are_read_and_not_read_are_named(qwen: Any, write: Write) -> None:
    path = write([{**row, "score": 1, "id": i} for i, row in enumerate(pairs(3))], "d/one.jsonl")
    write(pairs(5)[3:], "d/two.jsonl")
    notes = load(qwen, {"path": path.removesuffix("/one.jsonl")}).report.notes
    assert notes == ["read: one.jsonl (3 rows), two.jsonl (2 rows)", "columns that nothing reads: score, id"]


def test_lengths_are_those_of_the_longer_response(qwen: Any, write: Write) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "much longer than that"}, *pairs(2)]
    examples = load(qwen, [{"path": write(rows)}, {"path": write(pairs(1), "more.jsonl"), "weight": 2}])
    assert examples.lengths().tolist() == [
        [len(examples.prompt_ids(i)), max(len(row.response_ids) for row in examples.rows(i))]
        for i in range(len(examples))
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [
                {"chosen": f"Q: what is {i}?\nA: yes, {i}.", "rejected": f"Q: what is {i}?\nA: no, {i}."}
                for i in range(5)
            ],
            ["prompts are what chosen and rejected begin with: 'Q: what is 0?', 'Q: what is 1?', 'Q: what is 2?', ..."],
        ),
        (
            [
                {
                    side: [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"{side} {i}"}]
                    for side in ("chosen", "rejected")
                }
                for i in range(3)
            ],
            [],
        ),
        (
            [
                {"chosen": f"\n\nHuman: {i}?\n\nAssistant: a{i}", "rejected": f"\n\nHuman: {i}?\n\nAssistant: b{i}"}
                for i in range(3)
            ],
            [],
        ),
    ],
)
def test_prompts_that_no_column_holds_are_shown(qwen: Any, write: Write, rows: Rows, said: list[str]) -> None:
    assert load(qwen, {"path": write(rows)}).report.notes == said
