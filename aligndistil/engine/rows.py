"""The body of a model over the rows of a batch: at once, or on a CPU a few of similar length at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aligndistil.batch import Batch
from aligndistil.engine.head import backbone

_CPU_STATES = 100_000
"""Hidden numbers that a CPU is given at once: with more, products grow no faster and rows are padded further."""


def hidden_states(model: PreTrainedModel, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the batch (k,) and their last hidden states (k, up to their longest, H), until all were given."""
    for rows in _rows_together(model, batch):
        attention_BT = batch.attention_BT[rows]
        longest = int(attention_BT.sum(-1).max())
        output = backbone(model)(
            input_ids=batch.ids_BT[rows, :longest], attention_mask=attention_BT[:, :longest].long(), use_cache=False
        )
        yield rows, output.last_hidden_state


def _rows_together(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Which rows are one forward pass: all, or on a CPU a few of similar length, which need little padding.

    Under ZeRO-3 every process needs the same number of forward passes.
    """
    rows = torch.arange(batch.rows, device=batch.ids_BT.device)
    if batch.ids_BT.is_cuda or hasattr(next(model.parameters()), "ds_id"):
        return (rows,)
    states_of_row = batch.ids_BT.shape[1] * model.config.get_text_config().hidden_size
    together = max(2, _CPU_STATES // states_of_row)
    if together >= batch.rows:
        return (rows,)
    by_length = batch.attention_BT.sum(-1).argsort(stable=True)
    return torch.split(by_length, together)
