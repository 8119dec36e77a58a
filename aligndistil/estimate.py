"""What a stage will take, from configurations alone: parameters, steps, tokens, and memory per process.

An estimate for planning: model states are exact up to DeepSpeed's buffers; activations follow Korthikanti et al. 2022
(arXiv 2205.05198, section 4.1: 34 bytes per token and hidden unit and layer in half precision, without the attention
matrix, which sdpa does not keep).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aligndistil.engine.token_terms import chunk_size
from aligndistil.models import builtin_model, from_hub, pick_dtype
from aligndistil.objectives.base import Need, Role
from aligndistil.recipe import Stage

GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a configuration says of a model."""

    parameters: int
    hidden: int
    layers: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of one process."""

    weights: float
    gradients: float
    optimizer: float
    frozen: float
    activations: float
    logits: float
    """Of one chunk of response tokens, with the gradient of the head."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.frozen + self.activations + self.logits


def model_size(path: str, *, trust_remote_code: bool = False) -> ModelSize:
    """Count parameters without memory for them. Raises as loading the configuration does."""
    config = from_hub(
        path, lambda: AutoConfig.from_pretrained(builtin_model(path), trust_remote_code=trust_remote_code)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    return ModelSize(parameters, text.hidden_size, text.num_hidden_layers, text.vocab_size)


def memory(stage: Stage, policy: ModelSize, frozen: dict[Role, ModelSize], processes: int) -> Memory:
    """GiB per process; see the module for what is counted."""
    zero, world = stage.engine.zero_stage, processes
    half = pick_dtype(stage.model.dtype) == torch.bfloat16
    width = 2 if half else 4
    p = policy.parameters
    # In bfloat16 gradients are summed in float32, and the optimizer keeps a float32 copy beside its two moments.
    optimizer = p * (12 if half else 8)
    frozen_bytes = sum(size.parameters for size in frozen.values()) * width
    return Memory(
        weights=p * width / (world if zero == 3 else 1) / GIB,
        gradients=p * 4 / (world if zero >= 2 else 1) / GIB,
        optimizer=0.0 if stage.engine.offload != "none" else optimizer / (world if zero >= 1 else 1) / GIB,
        frozen=frozen_bytes / (world if zero == 3 else 1) / GIB,
        activations=_activations(stage, policy, width) / GIB,
        logits=_logits(stage, policy) / GIB,
    )


def _activations(stage: Stage, size: ModelSize, width: int) -> float:
    rows = stage.train.micro_batch_size * (2 if stage.objective.data == "pairs" else 1)
    longest = stage.rollout.max_new_tokens if stage.rollout else stage.data.max_response_length
    tokens = rows * (stage.data.max_prompt_length + longest)
    per_unit = 2 * width / 2 if stage.model.gradient_checkpointing else 34 * width / 2
    once = 34 * width / 2 * tokens * size.hidden if stage.model.gradient_checkpointing else 0
    return per_unit * tokens * size.hidden * size.layers + once


def _logits(stage: Stage, size: ModelSize) -> float:
    chunk = stage.engine.chunk_tokens
    tokens = chunk_size(size.vocab) if chunk == "auto" else chunk
    whole = sum(need is Need.DISTRIBUTION for need in stage.objective.needs.values())
    buffers = 1 + 3 * whole
    return 4 * size.vocab * (tokens * buffers + size.hidden)
