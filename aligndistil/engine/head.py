"""The language-model head: hidden states to float32 logits, with what some architectures do after the product.

What a model does after the product is measured, not read from names in its configuration: its own code is run on hidden
states that are given to it in place of its body's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligndistil.errors import UserError


@dataclass(frozen=True, slots=True)
class Head:
    """How one model turns hidden states into logits."""

    linear: nn.Linear
    """The output embeddings; read at each call, since ZeRO-3 gathers the weight just before."""
    scale: float
    """Factor on the logits (Cohere's `logit_scale`, Falcon-H1's multiplier, one over Granite's `logits_scaling`)."""
    softcap: float | None
    """The largest logit, where a tanh bends them towards one (Gemma 2, RecurrentGemma)."""
    vocab: int
    """Rows that are tokens of the tokenizer: the rest is padding of the matrix and is cut before any softmax."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, vocab: int) -> Head:
        """The head of a causal language model whose weights are whole, measured.

        Raises UserError when the model is not causal, has no separate body, or makes its logits in another way than by
        a linear product with bias, factor and cap, or with more trained weights than those of the product.
        """
        was_training = model.training
        model.eval()
        try:
            return _measured(model, vocab)
        finally:
            model.train(was_training)

    def project(self, hidden: Tensor) -> Tensor:
        """(n, H) to the raw float32 product (n, all rows), never rounded to bfloat16 on the way."""
        logits = matmul_float32(hidden, self.linear.weight.t())
        return logits if self.linear.bias is None else logits + self.linear.bias.float()

    def finish(self, raw: Tensor) -> Tensor:
        """Raw products to logits (n, V): scale, cap, cut; differentiable."""
        return finished(raw, self.scale, self.softcap, self.vocab)

    @property
    def is_plain(self) -> bool:
        """Whether logits are the product itself, so that work may be done in its memory."""
        return self.scale == 1.0 and self.softcap is None


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result: operands stay bfloat16 on CUDA (torch >= 2.8), and are widened elsewhere."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b.to(a.dtype)
    if a.is_cuda and _MM_TAKES_OUT_DTYPE:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32 and in the memory of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _MM_TAKES_OUT_DTYPE:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def finished(raw: Tensor, scale: float, softcap: float | None, vocab: int) -> Tensor:
    """See `Head.finish`."""
    logits = raw[:, :vocab]
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


_MM_TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, which returns `last_hidden_state`: the child that holds the input embeddings."""
    embeddings = model.get_input_embeddings()
    for child in model.children():
        if child is not embeddings and any(part is embeddings for part in child.modules()):
            return child
    raise _refusal(model, "has no separate body and language-model head")


def _refusal(model: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"model {model.config.name_or_path!r} ({type(model).__name__}) {why}; use a causal language model of a family "
        "that docs/families.md lists as exact"
    )


def _measured(model: PreTrainedModel, vocab: int) -> Head:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, 8), generator=draw).to(model.device)

    def run(module: nn.Module, ids: Tensor) -> Any:
        try:
            return module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            why = f"cannot be run on token ids alone ({type(error).__name__}: {first})"
            raise _refusal(model, why) from error

    def logits_of(ids: Tensor) -> Tensor:
        logits: Tensor = run(model, ids).logits[..., :vocab]
        if logits.shape != (*ids.shape, vocab):
            raise _refusal(model, f"gives logits of shape {tuple(logits.shape)} for token ids of {tuple(ids.shape)}")
        return logits

    _check_causal(model, logits_of, ids, vocab)
    linear, body = model.get_output_embeddings(), backbone(model)
    if not isinstance(linear, nn.Linear):
        raise _refusal(model, "has no linear language-model head")
    with _first_called(model, body) as called:
        run(model, ids)
    (part, output), own = (called or [(None, None)])[0], run(body, ids)
    if not (hasattr(output, "last_hidden_state") and hasattr(own, "last_hidden_state")):
        raise _refusal(model, "has a body that returns no last_hidden_state")
    states = output.last_hidden_state
    if states.shape != (*ids.shape, linear.in_features):
        raise _refusal(
            model, f"changes its hidden states ({states.shape[-1]} wide) before its head ({linear.in_features})"
        )
    if not states.isfinite().all():
        raise _refusal(model, "has hidden states that are not finite: its weights are damaged, or need another dtype")
    error = float((own.last_hidden_state - states).abs().max() / states.abs().max())
    if not error < (0.05 if states.dtype == torch.bfloat16 else 1e-3):
        raise _refusal(model, f"gives its body more than token ids (its states differ by {error:.1e}, relative)")

    raw = Head(linear, 1.0, None, vocab)
    with _wide(model, part, linear) as dtype:
        direction = torch.randn(states.shape, generator=draw).to(states.device, dtype)
        direction /= raw.project(direction.flatten(0, 1)).abs().max()

        def both(states: Tensor) -> tuple[Tensor, Tensor]:
            """(n, V) the plain product, and the logits that the model's own code makes of the same hidden states."""
            with _replaced(part, replace(output, last_hidden_state=states)):
                logits = logits_of(ids).flatten(0, 1).to(dtype)
            return raw.finish(raw.project(states.flatten(0, 1))), logits

        inside = {id(p) for p in (*part.parameters(), linear.weight, linear.bias)}
        beside = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
        with torch.enable_grad():
            total = both(states.to(dtype))[1].sum()
        if beside and total.requires_grad:
            found = torch.autograd.grad(total, list(beside.values()), allow_unused=True)
            if used := [name for name, gradient in zip(beside, found, strict=True) if gradient is not None]:
                raise _refusal(model, f"has weights beside its body and head that change its logits ({used[0]})")

        # Small logits show the factor, large ones the cap; with it, the factor is found again.
        products, small = both(direction * 0.01)
        scale, cap = _slope(products, small), None
        top = float(both(direction * (1e4 / abs(scale or 1.0)))[1].abs().max())
        if top < 0.5e4:
            cap, scale = top, _slope(products, top * torch.atanh(small / top))
        numbers = list(_numbers(model.config.to_dict()))
        head = Head(linear, _exact(scale, numbers), None if cap is None else _exact(cap, numbers), vocab)
        worst = 0.0
        for some in (states.to(dtype), *(direction * (size / abs(scale or 1.0)) for size in (1.0, 10.0, 100.0))):
            products, theirs = both(some)
            error = float((head.finish(products) - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    if not worst < 1e-4:
        raise _refusal(
            model,
            "makes its logits otherwise than as head(hidden) with a bias, a factor and a soft cap (they differ by "
            f"{worst:.1e}, relative)",
        )
    return head


def _check_causal(model: PreTrainedModel, logits_of: Callable[[Tensor], Tensor], ids: Tensor, vocab: int) -> None:
    """Other tokens must change the distributions that come after them, and none that come before."""
    half, others = ids.shape[1] // 2, (ids + vocab // 2) % vocab
    logits = logits_of(ids).float()
    before, moved = logits[:, :half], logits_of(torch.cat([ids[:, :half], others[:, half:]], 1)).float()[:, :half]
    after = logits_of(torch.cat([others[:, :half], ids[:, half:]], 1)).float()[:, half:]
    backward, forward = float((moved - before).abs().max()), float((after - logits[:, half:]).abs().max())
    # Experts that are given other tokens round otherwise.
    share, floor = (0.3, 0.004) if model.dtype == torch.bfloat16 else (1e-3, 1e-5)
    if backward > share * forward and backward > floor * float(logits.abs().max()):
        nats = float((moved.log_softmax(-1) - before.log_softmax(-1)).abs().max())
        raise _refusal(
            model, f"is not causal: later tokens change the log-probabilities of earlier ones, by up to {nats:.2g} nats"
        )
    if forward == 0:
        raise _refusal(model, "reads no earlier tokens: other ones change nothing that comes after them")


@contextmanager
def _first_called(model: PreTrainedModel, body: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """The module that the model calls as its body, and its output: the outermost that holds the input embeddings.

    It is usually the body itself; Bart's decoders are wrapped once more, and called inside of the wrapper.
    """
    embeddings = model.get_input_embeddings()
    finished: list[tuple[Any, Any]] = []
    holders = [part for part in body.modules() if any(inner is embeddings for inner in part.modules())]
    hooks = [part.register_forward_hook(lambda part, _, output: finished.insert(0, (part, output))) for part in holders]
    try:
        yield finished
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaced(part: nn.Module, output: Any) -> Iterator[None]:
    """A module that gives this output, whatever it is given."""
    own = part.__dict__.get("forward")
    part.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del part.forward
        if own is not None:
            part.forward = own


@contextmanager
def _wide(model: PreTrainedModel, body: nn.Module, linear: nn.Linear) -> Iterator[torch.dtype]:
    """The head, and all that is no part of the body, in float32 (float64 stays); tied weights too, for so long."""
    inside = {id(tensor) for tensor in chain(body.parameters(), body.buffers())}
    outside = [tensor for tensor in chain(model.parameters(), model.buffers()) if id(tensor) not in inside]
    dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    kept = [(tensor, tensor.data) for tensor in (*outside, *linear.parameters()) if tensor.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield dtype
    finally:
        for tensor, data in kept:
            tensor.data = data


def _slope(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x * x).sum())


def _exact(measured: float, numbers: list[float]) -> float:
    """The number of a configuration, or one over it, that was measured up to rounding; the measured one where none."""
    for number in (1.0, *numbers, *(1 / number for number in numbers)):
        if abs(number - measured) < 1e-5 * abs(measured):
            return number
    return measured


def _numbers(value: Any) -> Iterator[float]:
    """Every number but 0 of a nested configuration."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value:
        yield float(value)
