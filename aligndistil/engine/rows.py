"""The body of a model over the rows of a batch, and how they are laid out for it.

Rows are padded on the right and the models are causal, so that no padding mask is needed: what comes after a token
changes nothing for it, and without a mask the fast attention kernels run. Two rows of a pair may be one row, in which
their prompt stands once: `[prompt][chosen][rejected]`, with a mask that keeps the responses from seeing each other.
Kernels that tell texts apart by their positions are given all rows as one, without padding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.head import backbone

logger = logging.getLogger(__name__)

_BY_POSITIONS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations of attention that keep texts in one row apart where positions start again, at no cost."""
_CPU_STATES = 100_000
"""Hidden numbers that a CPU is given at once: with more, products grow no faster and rows are padded further."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass."""

    ids_RW: Tensor
    positions_RW: Tensor | None = None
    """None for those that the model counts itself."""
    segment_RW: Tensor | None = None
    """0 for the prompt, 1 and 2 for responses that see it and not each other; None for texts that positions tell
    apart."""


_Layout: TypeAlias = tuple[list[_Pass], Tensor | None]
"""The forward passes for a batch, and the place among their states of each of its own tokens, (B * T,); None for the
places that the tokens have in the batch."""


class Body:
    """A causal model without its head, which gives the hidden states of a batch."""

    def __init__(self, model: PreTrainedModel, *, share_prompts: bool = False) -> None:
        """Of a model whose weights are whole. Where it cannot `share_prompts`, a line of the log says so."""
        self.model, self._shares, self._packs = model, False, False
        name, kind = model.config.name_or_path, type(model).__name__
        if share_prompts:
            self._shares = not (why := _cannot_share(model))
            if why:
                logger.info("%s (%s): chosen and rejected are read with a prompt each: %s", name, kind, why)
        if model.config._attn_implementation in _BY_POSITIONS:
            self._packs = not (why := _differs(model, _packed))
            if why:
                logger.info("%s (%s): rows are padded: %s", name, kind, why)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(N, H) last hidden states, and the place among them of each token, (B * T,); None for their own places.

        The places of padding mean nothing.
        """
        width, together = self.model.config.get_text_config().hidden_size, batch.rows
        sharded = hasattr(next(self.model.parameters()), "ds_id")
        if not batch.ids_BT.is_cuda and not sharded:  # under ZeRO-3 every process makes the same number of passes
            together = max(2, _CPU_STATES // (batch.width * width))
        if self._shares and _may_share(batch, width):
            passes, places = _shared(batch, max(1, together // 2))
        else:
            passes, places = _packed(batch) if self._packs else _padded(batch, together)
        return _states(self.model, passes), places

    def response_states(self, batch: Batch) -> Tensor:
        """(n, H) the hidden states that predict the response tokens of a batch, row after row."""
        return _before_responses(batch, *self.states(batch))


def _before_responses(batch: Batch, states: Tensor, places: Tensor | None) -> Tensor:
    """The state at position t - 1 predicts token t: this is the only place that says so."""
    before = batch.response_n - 1
    return states[before if places is None else places[before]]


def _states(model: PreTrainedModel, passes: Sequence[_Pass]) -> Tensor:
    """(N, H) of all passes, one after the other."""
    body, found = backbone(model), list[Tensor]()
    for one in passes:
        given: dict[str, Any] = {"input_ids": one.ids_RW, "use_cache": False}
        if one.positions_RW is not None:
            given["position_ids"] = one.positions_RW
        if one.segment_RW is not None:
            given["attention_mask"] = _mask_of(one.segment_RW)
        found.append(body(**given).last_hidden_state.flatten(0, 1))
    return found[0] if len(found) == 1 else torch.cat(found)


def _padded(batch: Batch, together: int) -> _Layout:
    """Rows as they are: all at once, or so many of similar length."""
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
    return passes, places.flatten().to(batch.ids_BT.device)


def _packed(batch: Batch, together: int = 0) -> _Layout:
    """All rows as one, without padding."""
    ends = torch.tensor([end for _, end in batch.spans])
    row = torch.repeat_interleave(torch.arange(batch.rows), ends)
    starts = ends.cumsum(0) - ends
    positions = torch.arange(len(row)) - starts[row]
    places = (starts[:, None] + torch.arange(batch.width)).clamp(max=len(row) - 1)
    device = batch.ids_BT.device
    source, positions = (row * batch.width + positions).to(device), positions.to(device)
    return [_Pass(batch.ids_BT.flatten()[source][None], positions[None])], places.flatten().to(device)


def _shared(batch: Batch, together: int) -> _Layout:
    """Pairs as one row each, so many in a pass."""
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


def _may_share(batch: Batch, hidden: int) -> bool:
    """Whether all rows are pairs with one prompt each, and it pays to read that once."""
    if batch.kind is not DataKind.PAIRS or not batch.shares_prompts:
        return False
    lengths = [_shared_length(batch, row) for row in range(0, batch.rows, 2)]
    return sharing_pays(lengths, batch.ids_BT.numel(), batch.width, hidden=hidden, device=batch.ids_BT.device.type)


def sharing_pays(lengths: Sequence[int], alone: int, width: int, *, hidden: int, device: str) -> bool:
    """Whether pairs that have these lengths as one row take less time so than in `alone` tokens of rows of `width`.

    A token takes 24 H^2 operations a layer in products (of a Llama-like layer), and 4 H for each token that it sees.
    FlexAttention leaves out what the mask does, sdpa on a CPU computes all of it; without a mask both leave out the
    half that a causal model does not see. On a CPU this is within a tenth of what was measured (benchmarks/README.md).
    """
    together = len(lengths) * max(lengths)
    seen = sum(length**2 for length in lengths) / 2 if device == "cuda" else together * max(lengths)
    shared = 24 * hidden**2 * together + 4 * hidden * seen
    return shared < 0.95 * (24 * hidden**2 * alone + 4 * hidden * alone * width / 2)


def _cannot_share(model: PreTrainedModel) -> str:
    """Why a model cannot be given pairs as one row each; empty where it can."""
    text, attention = model.config.get_text_config(), model.config._attn_implementation
    if _has_flex_attention(model.device) and attention != "sdpa":
        return f"its attention is {attention}, which the recipe asks for"
    layers = getattr(text, "layer_types", None)
    if layers and set(layers) != {"full_attention"}:
        return f"it has layers of the kind {min(set(layers) - {'full_attention'})}"
    if not layers and getattr(text, "sliding_window", None):
        return "it has a sliding window"
    return _differs(model, _shared)


def _differs(model: PreTrainedModel, laid_out: Callable[[Batch, int], _Layout]) -> str:
    """Why a model does not say the same of rows that are laid out so as of them as they are; empty where it does.

    Of one that is trained, the gradient of its first trained weights too: kernels may lack a backward pass.
    """
    was_training, embeddings = model.training, model.get_input_embeddings().weight
    # The first matrix of a new adapter has no gradient yet, the second one has.
    trained = [p for p in model.parameters() if p.requires_grad and p is not embeddings][:2]
    rows = [Row([1, 2, 3], [4, 5]), Row([1, 2, 3], [6, 7, 8, 9])]
    batch = collate(rows, DataKind.PAIRS, 0).to(model.device)
    said: list[list[Tensor]] = []
    try:
        model.train(bool(getattr(model, "is_gradient_checkpointing", False)))  # where it recomputes, it asks for that
        for name, part in model.named_modules():
            part.training &= ".lora_dropout." not in name
        for passes, places in (_padded(batch, batch.rows), laid_out(batch, 1)):
            with torch.set_grad_enabled(bool(trained)):
                states = _before_responses(batch, _states(model, passes), places)
                gradients = torch.autograd.grad(states.square().sum(), trained) if trained else ()
            said.append([states.detach(), *gradients])
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it takes no mask of its own ({type(error).__name__}: {first})"
    finally:
        model.train(was_training)
    for what, expected, found in zip(("states", "gradient", "gradient"), *said, strict=False):
        difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
        if difference > (0.05 if expected.dtype == torch.bfloat16 else 1e-4):
            return f"its {what} would differ by {difference:.1e}, relative"
    return ""


def _mask_of(segment_RW: Tensor) -> Any:
    """What a model is given as its mask: a BlockMask for FlexAttention on a GPU, else (R, 1, W, W) for sdpa.

    A token sees the earlier ones of its own response, and of the prompt.
    """
    rows, width = segment_RW.shape
    if not _has_flex_attention(segment_RW.device):
        own, other = segment_RW[:, :, None], segment_RW[:, None, :]
        places = torch.arange(width, device=segment_RW.device)
        return ((places[:, None] >= places) & ((own == other) | (other == 0)))[:, None]
    _let_sdpa_take_block_masks()

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = segment_RW[row, query], segment_RW[row, key]
        return (query >= key) & ((own == other) | (other == 0))

    return create_block_mask(sees, rows, None, width, width, device=segment_RW.device)


def _has_flex_attention(device: torch.device) -> bool:
    return device.type == "cuda"  # on a CPU it has no backward pass


@functools.cache
def _let_sdpa_take_block_masks() -> None:
    """Attention that is computed again in the backward pass is given the mask alone, so the mask decides."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
        if not isinstance(attention_mask, BlockMask):
            return sdpa(module, query, key, value, attention_mask, **more)
        return _flex_attention(module, query, key, value, attention_mask, **more)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


def _flex_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    output: Tensor = flex_attention_forward(module, query, key, value, mask, scaling=scaling)[0]  # type: ignore[arg-type]
    return output, None
