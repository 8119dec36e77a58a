"""Every case of a folder of golden files: the copies beside this file, or the folder ALIGNDISTIL_GOLDEN_DIR names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from case import FOLDER, Case
from plain import Logits, chunked_loss, gradient_of, plain_loss, plain_terms
from readers import READ_ELSEWHERE, cases_of
from torch import Tensor

from aligndistil.maths import sum_tokens
from aligndistil.objectives.base import Loss, Role

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FILES = sorted(FOLDER.glob("*.json"))
CASES = [pytest.param(case, id=f"{path.stem}-{case.name}") for path in FILES for case in cases_of(path) or []]


def on_leaf(case: Case) -> tuple[Tensor, Logits]:
    """The policy's logits as the file has them, and the logits of the batch, in its order of rows."""
    leaf = case.logits[Role.POLICY].clone().requires_grad_()
    return leaf, {role: (leaf if role is Role.POLICY else z)[case.order] for role, z in case.logits.items()}


def value_of(loss: Loss, metric: str) -> Tensor:
    total, count = loss.metrics[metric]
    return total / count


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
    leaf, logits = on_leaf(case)
    loss = plain_loss(case.objective, case.batch, logits)
    assert loss.per_example.isfinite().all()
    if case.loss is not None and case.gradient is not None:
        torch.testing.assert_close(float(loss.per_example.mean().detach()), case.loss, **EXACT)
        torch.testing.assert_close(gradient_of(loss, leaf), case.gradient, **EXACT)
    if case.per_example is not None:
        torch.testing.assert_close(loss.per_example, case.per_example, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_terms_and_metrics_equal_the_golden_ones(case: Case) -> None:
    _, logits = on_leaf(case)
    terms = plain_terms(case.objective, case.batch, logits)
    loss = case.objective.loss(case.batch, terms)
    for name, expected in case.terms.items():
        torch.testing.assert_close(terms[name], expected, **EXACT, msg=name)
    for name, expected in case.per_row.items():
        torch.testing.assert_close(sum_tokens(terms[name], case.batch.response_BT), expected, **EXACT, msg=name)
    for name, number in case.metrics.items():
        torch.testing.assert_close(float(value_of(loss, name)), number, **EXACT, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_the_chunked_engine_gives_the_golden_loss_and_gradient(case: Case, chunk: int) -> None:
    plain_leaf, logits = on_leaf(case)
    plain = plain_loss(case.objective, case.batch, logits)
    leaf, logits = on_leaf(case)
    chunked = chunked_loss(case.objective, case.batch, logits, chunk)
    torch.testing.assert_close(chunked.per_example, plain.per_example, **EXACT)
    assert {name: float(value_of(chunked, name)) for name in chunked.metrics} == pytest.approx(
        {name: float(value_of(plain, name)) for name in plain.metrics}, rel=1e-9, abs=1e-9
    )
    gradient = gradient_of(chunked, leaf)
    torch.testing.assert_close(gradient, gradient_of(plain, plain_leaf), **EXACT)
    if case.loss is not None and case.gradient is not None:
        torch.testing.assert_close(float(chunked.per_example.mean().detach()), case.loss, **EXACT)
        torch.testing.assert_close(gradient, case.gradient, **EXACT)


@pytest.mark.parametrize("case", [param for param in CASES if param.values[0].float32])
def test_the_loss_equals_the_authors_code_where_its_positions_are_right(case: Case) -> None:
    loss = float(plain_loss(case.objective, case.batch, on_leaf(case)[1]).per_example.mean().detach())
    assert loss == pytest.approx(case.float32["authors_aligned_f32"], rel=1e-4)


@pytest.mark.parametrize("case", [param for param in CASES if param.values[0].faults])
def test_known_faults_of_the_authors_code_are_not_reproduced(case: Case) -> None:
    loss = float(plain_loss(case.objective, case.batch, on_leaf(case)[1]).per_example.mean().detach())
    for name, wrong in case.faults.items():
        assert abs(loss - wrong) > 0.01 * wrong, name
