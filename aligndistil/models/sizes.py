"""The shapes of a model, from its configuration alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from aligndistil.errors import ServiceError
from aligndistil.models.places import configured, from_hub, located

_QWEN2_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-1.5B-Instruct": _QWEN2_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_1_5B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
}
"""The shapes of the models that shipped recipes name, for planning where the Hub cannot be reached."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a configuration says of a model."""

    parameters: int
    hidden: int
    layers: int
    vocab: int
    intermediate: int
    """Width of the feed-forward layers."""
    q_width: int
    """Units of all query heads together."""
    kv_width: int
    """The same of all key (or value) heads."""
    tied: bool
    """Whether the head's weights are those of the embedding."""
    scalar: bool = False
    """Whether the head has one output."""
    linears: tuple[tuple[str, int, int], ...] = ()
    """Name, inputs and outputs of each linear layer of the body."""

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with: all but the embedding and the head."""
        return self.parameters - self.vocab * self.hidden - self.head * (not self.tied)

    @property
    def head(self) -> int:
        """Weights of the head, which may be those of the embedding."""
        return self.hidden * (1 if self.scalar else self.vocab)

    def adapters(self, rank: int, targets: Sequence[str] | str) -> int:
        """Parameters of low-rank adapters on all linear layers of the body, or those whose name ends like a target."""
        return sum(
            rank * (inputs + outputs)
            for name, inputs, outputs in self.linears
            if targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in targets)
        )


@functools.cache
def configuration(path: str, trust_remote_code: bool = False) -> PretrainedConfig | ServiceError:
    """A model's configuration, or why the Hub did not give it: each attempt at an unreachable Hub takes half a minute.

    Raises what else loading a configuration raises.
    """
    place, options = located(configured(path))
    options["trust_remote_code"] = trust_remote_code
    try:
        loaded: PretrainedConfig = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options))
        return loaded
    except ServiceError as error:
        return error


@functools.cache
def model_size(path: str, *, scalar: bool = False, trust_remote_code: bool = False) -> ModelSize:
    """Count parameters without memory for them; a scalar head has one output instead of a vocabulary.

    Raises ServiceError when the Hub cannot be reached and the model is not one of KNOWN_MODELS, and otherwise as
    loading the configuration does.
    """
    config = configuration(path, trust_remote_code)
    if isinstance(config, ServiceError):
        name, _ = located(path)
        if name not in KNOWN_MODELS:
            raise config
        config = AutoConfig.for_model(**KNOWN_MODELS[name])
    text = config.get_text_config()
    family: Any = AutoModel if scalar else AutoModelForCausalLM

    def without_weights() -> Any:
        with torch.device("meta"):
            return family.from_config(config, trust_remote_code=trust_remote_code)

    model = from_hub(path, without_weights)

    def said(name: str, otherwise: int) -> int:
        """Not every architecture has heads, fewer of keys than of queries, a size of its own for them, and so on."""
        value = getattr(text, name, None)
        value = max(value) if isinstance(value, list | tuple) and value else value  # one for each layer
        return value if isinstance(value, int) and value > 0 else otherwise

    hidden = text.hidden_size
    heads = said("num_attention_heads", 1)
    head_dim = said("head_dim", hidden // heads)
    output = None if scalar else model.get_output_embeddings()
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()) + (hidden if scalar else 0),
        hidden=hidden,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        intermediate=said("intermediate_size", 4 * hidden),
        q_width=heads * head_dim,
        kv_width=said("num_key_value_heads", heads) * head_dim,
        tied=output is not None and output.weight is model.get_input_embeddings().weight,
        scalar=scalar,
        linears=tuple(
            (name, *shape)
            for name, module in model.named_modules()
            if module is not output and (shape := _linear_shape(module)) is not None
        ),
    )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear layer, which is stored the other way round
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return None
