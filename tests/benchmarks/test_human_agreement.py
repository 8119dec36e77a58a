"""A judge's agreement with people, on made-up verdicts of which it is known by hand."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from aligndistil.benchmarks.alpaca_eval import package
from aligndistil.benchmarks.files import Files
from aligndistil.benchmarks.human_agreement import ANNOTATIONS, CROSS_ANNOTATIONS, HumanAgreement, published
from aligndistil.errors import UserError

pytestmark = pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="alpaca-eval is not installed")

MODELS = {"a": 30, "b": 12, "c": 21, "d": 6}
"""Of 40 pairs of each, how many of the model's outputs (the second ones) most people prefer."""
PAIRS = [(f"{model} {i}", 2 if i < wins else 1) for model, wins in MODELS.items() for i in range(40)]
"""Instruction, and the majority: four to none for even pairs, three to one for odd ones."""


def people() -> list[dict[str, object]]:
    return [
        {
            "instruction": name,
            "output_1": f"first {name}",
            "output_2": f"second {name}",
            "annotator_index": person,
            "datasplit": "eval",
            "preference": 3 - majority if n % 2 and person == n % 4 else majority,
        }
        for person in range(4)
        for n, (name, majority) in enumerate(PAIRS)
    ]


@pytest.fixture(scope="module")
def human(tmp_path_factory: pytest.TempPathFactory) -> HumanAgreement:
    folder = tmp_path_factory.mktemp("people")
    rows = people()
    (folder / CROSS_ANNOTATIONS.name).write_text(json.dumps(rows))
    models = [{**row, "generator": str(row["instruction"])[0]} for row in rows if row["annotator_index"] == 0]
    (folder / ANNOTATIONS.name).write_text(json.dumps(models))
    return HumanAgreement(Files(folder))


def verdicts(preferences: list[float], first: float = 0.0) -> dict[str, float]:
    """Of a judge that prefers second outputs so much (0 to 1), and the one shown first by `first` more."""
    return {
        key: value
        for i, p in enumerate(preferences)
        for key, value in ((f"{i}/output_1-first", 1 - p + first), (f"{i}/output_2-first", p + first))
    }


MAJORITY = [majority - 1.0 for _, majority in PAIRS]


def test_each_pair_is_asked_about_once_in_either_order(human: HumanAgreement) -> None:
    asks = human.asks()
    assert len({ask.key for ask in asks}) == len(asks) == 2 * len(PAIRS)
    first, second = (ask.compared for ask in asks[4:6])
    assert first is not None
    assert second is not None
    assert (first.first, first.second) == ("first a 2", "second a 2") == (second.second, second.first)


def test_the_majority_agrees_wholly(human: HumanAgreement) -> None:
    found = human.scores(verdicts(MAJORITY))
    assert (found.agreement, found.error, found.annotations) == (100, 0, 160)
    assert found.spearman == pytest.approx(1)


def test_a_judge_that_is_wrong_of_one_pair_in_four(human: HumanAgreement) -> None:
    wrong = [1 - p if i % 4 == 0 else p for i, p in enumerate(MAJORITY)]
    found = human.scores(verdicts(wrong))
    assert found.agreement == pytest.approx(75)
    # The sample deviation of 120 ones and 40 zeros, over the root of 160.
    assert found.error == pytest.approx(100 * (0.75 * 0.25 / 159) ** 0.5)
    # People's win rates are over all four verdicts, of which an eighth is the other way.
    of_people = [
        np.mean([row["preference"] == 2 for row in people() if str(row["instruction"])[0] == model]) for model in MODELS
    ]
    of_judge = np.reshape(wrong, (4, 40)).mean(axis=1)
    ranks = np.argsort(np.argsort(of_people)), np.argsort(np.argsort(of_judge))
    assert found.pearson == pytest.approx(np.corrcoef(of_people, of_judge)[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.pearson < 1


def test_a_preference_counts_as_far_as_it_goes_and_the_order_shown_does_not(human: HumanAgreement) -> None:
    unsure = [0.2 + 0.6 * p for p in MAJORITY]
    assert human.scores(verdicts(unsure, first=0.1)).agreement == pytest.approx(80)
    assert human.scores(verdicts([0.5] * 160)).agreement == pytest.approx(50)


def test_a_pair_without_a_verdict_is_left_out(human: HumanAgreement) -> None:
    given = verdicts([*MAJORITY[:30], *(1 - p for p in MAJORITY[30:40]), *MAJORITY[40:]])
    for i in range(80, 160):
        del given[f"{i}/output_1-first"]
    found = human.scores(given)
    assert found.annotations == 80
    assert found.agreement == pytest.approx(100 * 70 / 80)
    assert human.scores({}).annotations == 0
    assert np.isnan(human.scores({}).agreement)


def test_one_person_against_the_others(human: HumanAgreement) -> None:
    found = human.humans()
    # Half the pairs are unanimous; of the other half one of four stands against the other three.
    assert found.agreement == pytest.approx(100 * (0.5 + 0.5 * 3 / 4))
    assert found.annotations == 640
    assert (found.spearman, found.pearson) == (pytest.approx(1), pytest.approx(1))


def test_the_package_s_own_function_says_the_same(human: HumanAgreement) -> None:
    analyze = package("analyze")
    analyzer = human._analyzer
    rows = human._people.query("index == 0").assign(
        preference=[1.25 if majority == 1 else 1.9 for _, majority in PAIRS], price_per_example=0, time_per_example=0
    )
    expected = analyze.get_metrics_evaluator(analyzer, rows, "mine")
    found = human.scores(verdicts([0.25 if majority == 1 else 0.9 for _, majority in PAIRS]))
    assert found.agreement == pytest.approx(expected["Human agreement"])
    assert found.spearman == pytest.approx(expected["Spearman corr."])
    assert found.pearson == pytest.approx(expected["Pearson corr."])
    assert found.annotations == expected["# parsed"]


def test_the_published_table_is_the_package_s() -> None:
    table = published()
    assert round(table["humans"].agreement, 1) == 65.7
    assert table["humans"].spearman == 1
    assert table["alpaca_eval_gpt4"].annotations == 4 * 648
    assert all(50 < row.agreement < 100 for row in table.values())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / CROSS_ANNOTATIONS.name).write_text(json.dumps([{"instruction": "x"}]))
    with pytest.raises(UserError, match="has no column output_1"):
        HumanAgreement(Files(tmp_path))
    (tmp_path / CROSS_ANNOTATIONS.name).write_text(json.dumps(people()[:160]))
    (tmp_path / ANNOTATIONS.name).write_text(json.dumps([{**row, "generator": "a"} for row in people()]))
    with pytest.raises(UserError, match="no pair with 4 verdicts"):
        HumanAgreement(Files(tmp_path))
