"""The equations agree with the golden files, and the package agrees with the equations on other inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_golden
import test_golden_terms
import test_theorem
from case import COMMITTED, FLOAT32, Case
from make import EQUATIONS, make
from readers import cases_of

IN_FLOAT32 = ("f32", "as_is")
"""In the keys of losses of float32 code."""
WHITENED_IN_FLOAT32 = {"ppo": {"whitened_advantages", "policy_loss", "grad_new_logp"}, "rto": {"whitened"}}
HYPERPARAMETERS = {"reward_clip"}
"""Lists that are not drawn."""


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number, or text, with the keys that lead to it; but for notes."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "note":
                yield from numbers(inner, (*path, str(key)))
    else:
        yield path, value


def test_every_golden_file_has_an_equation() -> None:
    assert sorted(path.stem for path in COMMITTED.glob("*.json")) == sorted(EQUATIONS)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_equations_give_the_golden_numbers(name: str) -> None:
    content = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))
    found = dict(numbers(EQUATIONS[name](content["inputs"], content["expected"])))
    expected = dict(numbers(content["expected"]))
    assert found.keys() == expected.keys()
    for path, number in expected.items():
        if isinstance(number, str):
            assert found[path] == number
            continue
        single = any(mark in key for key in path for mark in IN_FLOAT32)
        whitened = WHITENED_IN_FLOAT32.get(name, set()) & set(path)
        tolerance = FLOAT32 if single else 1e-6 if whitened else 1e-9
        assert found[path] == pytest.approx(number, rel=tolerance, abs=tolerance), "/".join(path)


def test_another_seed_gives_other_inputs_in_the_same_shape(tmp_path: Path) -> None:
    make(1, tmp_path)
    for name in EQUATIONS:
        old, new = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for folder in (COMMITTED, tmp_path)
        )
        before, after = (dict(numbers(content["inputs"])) for content in (old, new))
        assert before.keys() == after.keys()
        assert dict(numbers(old["expected"])).keys() == dict(numbers(new["expected"])).keys()
        drawn = {path[0] for path in before if before[path] != after[path]}
        assert (
            drawn == {key for key, value in new["inputs"].items() if isinstance(value, list | dict)} - HYPERPARAMETERS
        )


def test_the_package_agrees_with_the_equations_on_other_inputs(tmp_path: Path) -> None:
    """The tests of this folder, on files that no one has seen."""
    make(2, tmp_path)
    for path in sorted(tmp_path.glob("*.json")):
        for case in cases_of(path) or []:
            if isinstance(case, Case):
                test_golden.test_loss_and_gradient_equal_the_golden_ones(case)
                test_golden.test_terms_and_metrics_equal_the_golden_ones(case)
                test_golden.test_known_faults_of_the_authors_code_are_not_reproduced(case)
            else:
                test_golden_terms.test_what_the_preparation_finds_equals_the_golden_values(case)
                test_golden_terms.test_losses_and_gradients_equal_the_golden_ones(case)
                test_golden_terms.test_metrics_equal_the_golden_ones(case)
                test_golden_terms.test_pieces_equal_the_golden_ones(case)
    entries = test_theorem.entries_of(tmp_path / "theorem1.json")
    assert entries
    for entry in entries.values():
        test_theorem.test_the_identity_holds_with_its_partition_functions(entry)
        test_theorem.test_with_prefixes_held_fixed_both_gradients_are_one(entry)
        test_theorem.test_the_target_is_where_distillation_rests_and_the_return_still_climbs(entry)
        test_theorem.test_the_optimum_of_the_return_is_that_of_the_file(entry)
        if entry["kind"] == "contrast":
            test_theorem.test_the_policy_gradients_point_where_the_file_says(entry)


def test_the_committed_files_are_not_overwritten() -> None:
    with pytest.raises(ValueError, match="choose another folder"):
        make(1, COMMITTED)
