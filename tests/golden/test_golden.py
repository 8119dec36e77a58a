"""Every case of a folder of golden files: the copies beside this file, or the folder ALIGNDISTIL_GOLDEN_DIR names."""

from __future__ import annotations

from pathlib import Path

import case as golden
import pytest
import torch
from case import FLOAT32, FOLDER, Case, assert_told_apart
from readers import READ_ELSEWHERE, TERMS_READERS, cases_of
from torch import Tensor

from aligndistil.maths import sum_tokens
from aligndistil.objectives.base import Loss, Role
from support.plain_formula import (
    Logits,
    chunked_loss,
    gradient_of,
    means,
    plain_loss,
    plain_preparation,
    plain_terms,
    step_means,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FILES = sorted(FOLDER.glob("*.json"))
WHOLE = [path for path in FILES if path.stem not in TERMS_READERS]
CASES = [pytest.param(case, id=f"{path.stem}-{case.name}") for path in WHOLE for case in cases_of(path) or []]


def on_leaf(case: Case) -> tuple[Tensor, Logits]:
    """The policy's logits as the file has them, and the logits of the batch, in its order of rows."""
    leaf = case.logits[Role.POLICY].clone().requires_grad_()
    return leaf, {role: (leaf if role == Role.POLICY else z)[case.order] for role, z in case.logits.items()}


def found(case: Case, leaf: Tensor) -> dict[str, Tensor]:
    """What the preparation of a step that is this one batch has to say."""
    if case.looked_at is None:
        return {}
    logits = {role: (leaf if role == Role.POLICY else z)[case.looked_at_order] for role, z in case.logits.items()}
    return step_means([plain_preparation(case.objective, case.looked_at, logits)])


def loss_of(case: Case) -> tuple[Tensor, Loss]:
    """The leaf, and the loss in it."""
    leaf, logits = on_leaf(case)
    return leaf, plain_loss(case.objective, case.batch, logits, found(case, leaf))


def test_the_folder_holds_a_file_that_is_known() -> None:
    assert any(cases_of(path) for path in FILES), f"no known golden file in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_read(path: Path) -> None:
    cases = cases_of(path)
    if path.stem in READ_ELSEWHERE:
        return
    if cases is None:
        pytest.skip(f"{path.name}: no reader knows it; its objective is not in this package")
    assert cases


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_golden_ones(case: Case) -> None:
    leaf, loss = loss_of(case)
    assert loss.per_example.isfinite().all()
    if case.loss is not None and case.gradient is not None:
        torch.testing.assert_close(float(loss.per_example.mean().detach()), case.loss, **EXACT)
        torch.testing.assert_close(gradient_of(loss, leaf), case.gradient, **EXACT)
    if case.per_example is not None:
        torch.testing.assert_close(loss.per_example, case.per_example, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_terms_and_metrics_equal_the_golden_ones(case: Case) -> None:
    leaf, logits = on_leaf(case)
    terms = plain_terms(case.objective, case.batch, logits)
    over_step = found(case, leaf)
    loss = case.objective.loss(case.batch, {**terms, **over_step})
    assert {name: float(value) for name, value in over_step.items()} == pytest.approx(case.found, rel=1e-9)
    for name, expected in case.terms.items():
        torch.testing.assert_close(terms[name], expected, **EXACT, msg=name)
    for name, expected in case.per_row.items():
        torch.testing.assert_close(sum_tokens(terms[name], case.batch.response_BT), expected, **EXACT, msg=name)
    measured = means(loss.metrics)
    for name, number in case.metrics.items():
        torch.testing.assert_close(measured[name], number, **EXACT, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_the_chunked_engine_gives_the_golden_loss_and_gradient(case: Case, chunk: int) -> None:
    plain_leaf, plain = loss_of(case)
    leaf, logits = on_leaf(case)
    chunked = chunked_loss(case.objective, case.batch, logits, chunk, found(case, leaf))
    torch.testing.assert_close(chunked.per_example, plain.per_example, **EXACT)
    assert means(chunked.metrics) == pytest.approx(means(plain.metrics), rel=1e-9, abs=1e-9)
    gradient = gradient_of(chunked, leaf)
    torch.testing.assert_close(gradient, gradient_of(plain, plain_leaf), **EXACT)
    if case.loss is not None and case.gradient is not None:
        torch.testing.assert_close(float(chunked.per_example.mean().detach()), case.loss, **EXACT)
        torch.testing.assert_close(gradient, case.gradient, **EXACT)


@pytest.mark.parametrize("case", [param for param in CASES if param.values[0].float32])
def test_the_loss_equals_the_authors_code_where_its_positions_are_right(case: Case) -> None:
    loss = float(loss_of(case)[1].per_example.mean().detach())
    assert loss == pytest.approx(case.float32["authors_aligned_f32"], rel=FLOAT32)


@pytest.mark.parametrize("case", [param for param in CASES if param.values[0].faults])
def test_known_faults_of_the_authors_code_are_not_reproduced(case: Case) -> None:
    """How far a wrong loss is from the right one, both of the file, says how far it must be from ours."""
    loss = float(loss_of(case)[1].per_example.mean().detach())
    for name, wrong in case.faults.items():
        assert case.loss is not None
        distance = abs(case.loss - wrong)
        assert_told_apart(distance / abs(case.loss), name)
        assert abs(loss - wrong) > distance / 2, name


def test_a_mistake_that_moves_nothing_fails_here_and_is_skipped_in_another_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_told_apart(2e-4, "one")
    monkeypatch.setattr(golden, "FOLDER", golden.COMMITTED)
    with pytest.raises(pytest.fail.Exception, match=r"cannot tell this apart .*, 5\.0e-05 away: one"):
        assert_told_apart(5e-5, "one")
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"cannot tell this apart .*, 5\.0e-05 away: one"):
        assert_told_apart(5e-5, "one")
