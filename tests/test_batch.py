from __future__ import annotations

import pytest
import torch

from aligndistil.batch import DataKind, Row, collate

ROWS = [Row([5, 6], [7, 1]), Row([8], [1], label=False)]


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS, DataKind.RESPONSES, pad_id=0)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 1], [8, 1, 0, 0]]
    assert batch.attention_BT.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_BT.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.label_B.tolist() == [True, False]
    assert batch.ids_BT.dtype == torch.int64


def test_masks_come_from_lengths_also_when_padding_is_eos() -> None:
    with_eos = collate(ROWS, DataKind.RESPONSES, pad_id=1)
    with_pad = collate(ROWS, DataKind.RESPONSES, pad_id=0)
    assert torch.equal(with_eos.attention_BT, with_pad.attention_BT)
    assert torch.equal(with_eos.response_BT, with_pad.response_BT)


def test_a_pair_is_one_example_of_two_rows() -> None:
    pairs = collate(ROWS, DataKind.PAIRS, pad_id=0)
    assert (pairs.rows, pairs.examples) == (2, 1)
    assert collate(ROWS, DataKind.RESPONSES, pad_id=0).examples == 2
    assert pairs.length_B.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("row", [Row([5], []), Row([], [1])])
def test_a_row_without_prompt_or_response_is_refused(row: Row) -> None:
    with pytest.raises(ValueError, match=r"row 1 has \d prompt and \d response tokens"):
        collate([ROWS[0], row], DataKind.RESPONSES, pad_id=0)


def test_moving_a_batch_moves_all_of_it() -> None:
    moved = collate(ROWS, DataKind.PAIRS, pad_id=0).to("meta")
    assert moved.kind is DataKind.PAIRS
    for tensor in (moved.ids_BT, moved.attention_BT, moved.response_BT, moved.label_B):
        assert tensor.device.type == "meta"
