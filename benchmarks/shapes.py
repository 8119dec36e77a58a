"""Shapes of well-known models, and the operations and bytes that a training step on them cannot do without.

Operations count a multiplication and an addition as two. The floor of a step is a lower bound, not a prediction: all
products at the measured matrix rate, the optimizer at the measured bandwidth, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OPTIMIZER_BYTES = 28
"""AdamW on a bfloat16 weight with a float32 copy: reads the gradient (2 bytes), the copy and two moments (12), writes
these three and the weight (14)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven matrices of a layer."""
        whole, part = (self.hidden, self.hidden), (self.hidden, self.hidden * self.kv_heads // self.heads)
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return whole, part, part, whole, up, up, down

    @property
    def body_weights(self) -> int:
        """Of all matrices between embeddings and head."""
        return self.layers * sum(rows * columns for rows, columns in self.products)

    @property
    def weights(self) -> int:
        """All but biases and norms, which are less than a thousandth."""
        return self.body_weights + self.vocab * self.hidden * (1 if self.tied else 2)


SHAPES = {
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151_936, tied=True),
    "qwen2.5-7b": Shape(28, 3584, 18_944, 28, 4, 152_064, tied=False),
    "tiny": Shape(2, 64, 128, 4, 2, 512, tied=True),
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine does at most, measured."""

    body: float
    """Operations a second in the products of a layer."""
    head: float
    """Operations a second in the products of the head."""
    bandwidth: float
    """Bytes a second, read and written."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the parts are measured on; see the options of gpu.py."""

    device: str
    dtype: str
    shape: str
    rows: int
    micro_rows: int
    tokens: int
    response_share: float
    steps: int

    @property
    def sizes(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def response(self) -> int:
        """Response tokens of a row."""
        return max(1, round(self.tokens * self.response_share))


def floor_seconds(asked: Asked, frozen: int, ceilings: Ceilings) -> float:
    """The least time of a step, with so many frozen models.

    For N weights in the body's matrices, L layers of width H, vocabulary V and f frozen models:

        body       tokens * (6 + 2 f) * N                  forward 2, backward 4; frozen models only forward
        attention  tokens * (6 + 2 f) * L * H * length     causal: half of all pairs of tokens, in two products
        head       response tokens * (6 + 2 f) * H * V
        optimizer  28 bytes a weight

        seconds = (body + attention) / body's rate + head / head's rate + optimizer / bandwidth
    """
    shape, passes = asked.sizes, 6 + 2 * frozen
    body = asked.rows * asked.tokens * passes * (shape.body_weights + shape.layers * shape.hidden * asked.tokens)
    head = asked.rows * asked.response * passes * shape.hidden * shape.vocab
    moved = OPTIMIZER_BYTES * shape.weights
    return body / ceilings.body + head / ceilings.head + moved / ceilings.bandwidth


def random_model(shape: Shape, seed: int, device: str, dtype: Any) -> Any:
    """A causal language model, made on the device itself: nothing is read or moved."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(config, dtype=dtype)
