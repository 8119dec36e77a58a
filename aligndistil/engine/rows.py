"""The body of a model over the rows of a batch, and how they are laid out for it.

Rows are padded on the right and the models are causal, so that no padding mask is needed: what comes after a token
changes nothing for it, and without a mask the fast attention kernels run. Two rows of a pair may be one row, in which
their prompt stands once: `[prompt][chosen][rejected]`, with a mask that keeps the responses from seeing each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.head import backbone

logger = logging.getLogger(__name__)

_CPU_STATES = 100_000
"""Hidden numbers that a CPU is given at once: with more, products grow no faster and rows are padded further."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass."""

    ids_RW: Tensor
    positions_RW: Tensor | None = None
    """None for those that the model counts itself."""
    segment_RW: Tensor | None = None
    """0 for the prompt, 1 and 2 for responses that see it and not each other; None for rows that are one text."""


class Body:
    """A causal model without its head, which gives the hidden states of a batch."""

    def __init__(self, model: PreTrainedModel, *, share_prompts: bool = False) -> None:
        """Of a model whose weights are whole. Where it cannot `share_prompts`, a line of the log says so."""
        self.model, self._shares = model, False
        if share_prompts:
            why = _cannot_share(model)
            self._shares = not why
            if why:
                logger.info(
                    "%s (%s): chosen and rejected are read with a prompt each: %s",
                    model.config.name_or_path,
                    type(model).__name__,
                    why,
                )

    def states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(N, H) last hidden states, and the place among them of each token, (B * T,); None for their own places.

        The places of padding mean nothing.
        """
        passes, places = self._laid_out(batch)
        states = [self._run(one).flatten(0, 1) for one in passes]
        return (states[0] if len(states) == 1 else torch.cat(states)), places

    def response_states(self, batch: Batch) -> Tensor:
        """(n, H) the hidden states that predict the response tokens of a batch, row after row.

        The state at position t - 1 predicts token t: this is the only place that says so.
        """
        states, places = self.states(batch)
        before = batch.response_n - 1
        return states[before if places is None else places[before]]

    def _run(self, one: _Pass) -> Tensor:
        body, given = backbone(self.model), {"input_ids": one.ids_RW, "use_cache": False}
        if one.segment_RW is None:
            return body(**given).last_hidden_state  # type: ignore[no-any-return]
        with _masked_attention(self.model, one.segment_RW) as mask:
            return body(**given, position_ids=one.positions_RW, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]

    def _laid_out(self, batch: Batch) -> tuple[list[_Pass], Tensor | None]:
        width, device = self.model.config.get_text_config().hidden_size, batch.ids_BT.device
        sharded = hasattr(next(self.model.parameters()), "ds_id")
        together = batch.rows
        if device.type == "cpu" and not sharded:  # under ZeRO-3 every process makes the same number of passes
            together = max(2, _CPU_STATES // (batch.width * width))
        if self._shares and _sharing_pays(batch, width):
            return _shared(batch, max(1, together // 2))
        if together >= batch.rows:
            return [_Pass(batch.ids_BT)], None
        order = sorted(range(batch.rows), key=lambda row: batch.spans[row].end)
        passes, places, start = [], torch.zeros(batch.ids_BT.shape, dtype=torch.long), 0
        for first in range(0, batch.rows, together):
            rows = order[first : first + together]
            longest = max(batch.spans[row].end for row in rows)
            passes.append(_Pass(batch.ids_BT[rows, :longest]))
            places[rows, :longest] = start + torch.arange(len(rows) * longest).view(len(rows), longest)
            start += len(rows) * longest
        return passes, places.flatten().to(device)


def _shared(batch: Batch, together: int) -> tuple[list[_Pass], Tensor]:
    """Pairs as one row each, a few in a pass, and where the tokens of the batch's own rows are then."""
    spans, device = batch.spans, batch.ids_BT.device
    order = sorted(range(0, batch.rows, 2), key=lambda row: _shared_length(batch, row))
    passes, start = [], 0
    places = torch.zeros(batch.ids_BT.shape, dtype=torch.long)
    for first in range(0, len(order), together):
        rows = order[first : first + together]
        width = max(_shared_length(batch, row) for row in rows)
        source, positions, segment = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for r, row in enumerate(rows):
            prompt, chosen, rejected = spans[row].start, spans[row].end, spans[row + 1].end
            both = chosen + rejected - prompt
            source[r, :chosen] = row * batch.width + torch.arange(chosen)
            source[r, chosen:both] = (row + 1) * batch.width + torch.arange(prompt, rejected)
            positions[r, :chosen], positions[r, chosen:both] = torch.arange(chosen), torch.arange(prompt, rejected)
            segment[r, prompt:chosen], segment[r, chosen:] = 1, 2
            own = start + r * width
            places[row, :chosen] = own + torch.arange(chosen)
            places[row + 1, :prompt] = own + torch.arange(prompt)
            places[row + 1, prompt:rejected] = own + torch.arange(chosen, both)
        ids = batch.ids_BT.flatten()[source.to(device)]
        passes.append(_Pass(ids, positions.to(device), segment.to(device)))
        start += len(rows) * width
    return passes, places.flatten().to(device)


def _shared_length(batch: Batch, row: int) -> int:
    return batch.spans[row].end + batch.spans[row + 1].end - batch.spans[row].start


def _sharing_pays(batch: Batch, width: int) -> bool:
    """Whether all rows are pairs with one prompt each, and that saves more than the mask costs.

    A token takes 24 H^2 operations a layer in products (of a Llama-like layer), and 4 H for each token that it sees.
    FlexAttention leaves out what the mask does, sdpa on a CPU computes all of it; without a mask both leave out the
    half that a causal model does not see. On a CPU this is within a tenth of what was measured (benchmarks/README.md).
    """
    if batch.kind is not DataKind.PAIRS or not batch.shares_prompts:
        return False
    lengths = [_shared_length(batch, row) for row in range(0, batch.rows, 2)]
    together, alone = len(lengths) * max(lengths), batch.rows * batch.width
    seen = sum(length**2 for length in lengths) / 2 if batch.ids_BT.is_cuda else together * max(lengths)
    shared = 24 * width**2 * together + 4 * width * seen
    return shared < 0.95 * (24 * width**2 * alone + 4 * width * alone * batch.width / 2)


def _cannot_share(model: PreTrainedModel) -> str:
    """Why a model does not say the same of a pair in one row as of its two rows; empty where it does."""
    text = model.config.get_text_config()
    layers = getattr(text, "layer_types", None)
    if layers and set(layers) != {"full_attention"}:
        return f"it has layers of the kind {min(set(layers) - {'full_attention'})}"
    if not layers and getattr(text, "sliding_window", None):
        return "it has a sliding window"
    was_training = model.training
    try:
        model.eval()
        rows = [Row([1, 2, 3], [4, 5]), Row([1, 2, 3], [6, 7, 8, 9])]
        batch = collate(rows, DataKind.PAIRS, 0).to(model.device)
        body = Body(model)
        with torch.no_grad():
            plain = body.response_states(batch)
            passes, places = _shared(batch, 1)
            shared = torch.cat([body._run(one).flatten(0, 1) for one in passes])[places[batch.response_n - 1]]
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it takes no mask of its own ({type(error).__name__}: {first})"
    finally:
        model.train(was_training)
    difference = float((plain - shared).abs().max() / plain.abs().max())
    if difference > (0.05 if plain.dtype == torch.bfloat16 else 1e-4):
        return f"their states would differ by {difference:.1e}, relative"
    return ""


@contextmanager
def _masked_attention(model: PreTrainedModel, segment_RW: Tensor) -> Iterator[Any]:
    """What a model is given as its mask, with the kernels that take it: FlexAttention's on a GPU, else sdpa's."""
    if not segment_RW.is_cuda:
        yield _dense_mask(segment_RW)
        return
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = segment_RW[row, query], segment_RW[row, key]
        return (query >= key) & ((own == other) | (other == 0))

    rows, width = segment_RW.shape
    mask = create_block_mask(sees, rows, None, width, width, device=segment_RW.device)
    configs = [model.config, model.config.get_text_config()]
    kept = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "flex_attention"
    try:
        yield mask
    finally:
        for config, attention in zip(configs, kept, strict=True):
            config._attn_implementation = attention


def _dense_mask(segment_RW: Tensor) -> Tensor:
    """(R, 1, W, W) whether a token sees another: earlier ones of its own response, and of the prompt."""
    own, other = segment_RW[:, :, None], segment_RW[:, None, :]
    places = torch.arange(segment_RW.shape[1], device=segment_RW.device)
    sees = (places[:, None] >= places) & ((own == other) | (other == 0))
    return sees[:, None]
