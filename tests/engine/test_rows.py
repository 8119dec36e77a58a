"""Rows that a CPU reads a few at a time: the same numbers, in the batch's own order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aligndistil.batch import Batch, DataKind
from aligndistil.engine.policy import response_hidden
from aligndistil.engine.scalar import ScalarNetwork
from support.micro_batches import ragged_batch
from support.models import build_model


def hidden(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    return partial(response_hidden, model)


def values(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    network = ScalarNetwork(model)
    return lambda batch: network(batch) * batch.attention_BT


@pytest.mark.parametrize(("rows", "passed"), [(2, [2, 2, 1]), (3, [3, 2]), (4, [4, 1])])
@pytest.mark.parametrize(("build", "reading"), [(build_model, hidden), (partial(build_model, scalar=True), values)])
def test_rows_that_are_read_a_few_at_a_time_give_the_same_numbers_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., Any],
    reading: Callable[[PreTrainedModel], Callable[[Batch], Tensor]],
    rows: int,
    passed: list[int],
) -> None:
    model, batch = build(seed=1).eval(), ragged_batch(DataKind.RESPONSES, examples=5)
    lengths = batch.attention_BT.sum(-1)
    assert not lengths.equal(lengths.sort().values)
    width = batch.ids_BT.shape[1] * model.config.hidden_size
    read, passes = reading(model), list[int]()
    model.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    with torch.no_grad():
        monkeypatch.setattr("aligndistil.engine.rows._CPU_STATES", 5 * width)
        whole = read(batch)
        monkeypatch.setattr("aligndistil.engine.rows._CPU_STATES", rows * width)
        parts = read(batch)
    assert passes == [5, *passed]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
