"""What a stage will take, from configurations alone: parameters, steps, tokens, and memory per process.

Memory is what is held at the fullest moment of a step with the longest rows. Model states are exact; activations are
the tensors that autograd keeps of a Llama-like decoder whose attention matrix sdpa does not keep. What is left out:
workspaces of the kernels, the fragmentation of the allocator, and parameters that ZeRO-3 has gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from aligndistil.batch import DataKind
from aligndistil.data import Examples, load_rows
from aligndistil.engine.token_terms import chunk_size
from aligndistil.errors import MissingError, ServiceError, UserError, out_of_memory
from aligndistil.models import configured, from_hub, layers_of, located, pick_dtype
from aligndistil.objectives.base import Need, Role
from aligndistil.recipe import Source, Stage
from aligndistil.training import is_code
from aligndistil.training.batches import Schedule

GIB = 2**30
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once (its default `reduce_bucket_size`); it allocates all of it."""

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
KNOWN_ROWS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
}
"""The same of data: rows by path and split."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a configuration says of a model."""

    parameters: int
    hidden: int
    layers: int
    vocab: int
    intermediate: int
    """Width of the feed-forward layers."""
    kv_width: int
    """Units of all key (or value) heads together."""
    linear: int = 0
    """Inputs and outputs of all linear layers of the body: adapters of rank r have r times as many parameters."""


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of one process."""

    weights: float
    """Of what is trained, as are the next three: the policy, and the critic where there is one."""
    gradients: float
    optimizer: float
    buffers: float
    """DeepSpeed's, for gradients on their way."""
    frozen: float
    activations: float
    logits: float
    """Of one chunk of response tokens, with the gradient of the head."""
    generation: float
    """The keys and values of a rollout, before there are activations and logits."""

    @property
    def total(self) -> float:
        states = self.weights + self.gradients + self.optimizer + self.buffers + self.frozen
        return states + max(self.activations + self.logits, self.generation)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage reads and samples."""

    examples: int
    kind: DataKind
    steps: int
    tokens: int
    """Prompt and response tokens that the steps read from the data."""
    sampled: int
    """Response tokens that are sampled at most."""
    exact: bool
    """False when the data were not at hand: rows are then all usable, and as long as the recipe allows."""


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
    heads = text.num_attention_heads
    # Not every architecture has fewer key heads than query heads, a head size of its own, or says its inner width.
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()) + (text.hidden_size if scalar else 0),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=kv_heads * head_dim,
        linear=sum(size for layer in layers_of(model).values() for size in layer.get_parameter("weight").shape),
    )


def memory(stage: Stage, policy: ModelSize, others: Mapping[str, ModelSize], processes: int) -> Memory:
    """GiB per process; see the module for what is counted."""
    half = pick_dtype(stage.model.dtype) == torch.bfloat16
    width = 2 if half else 4
    zero, world = stage.engine.zero_stage or int(half), processes
    trained = [policy, *(size for role, size in others.items() if role == Role.CRITIC)]
    lora, base = stage.model.lora, 0
    p = sum(size.parameters for size in trained)
    if lora is not None:  # what is trained are adapters, and one base is held for all models of this size
        p, base = sum(lora.r * size.linear for size in trained), policy.parameters
        others = {role: _on_base(size, policy, lora.r) for role, size in others.items()}
    # In bfloat16 gradients are summed in float32, and the optimizer keeps a float32 copy beside its two moments.
    optimizer = p * (12 if half else 8)
    staged = 4 if zero == 1 else width
    frozen = sum(size.parameters for role, size in others.items() if role != Role.CRITIC)
    if stage.evaluation.kl_initial and not stage.objective.is_scalar and lora is None:
        frozen += policy.parameters
    return Memory(
        weights=(base + p) * width / (world if zero == 3 else 1) / GIB,
        gradients=p * 4 / (world if zero >= 2 else 1) / GIB,
        optimizer=0.0 if stage.engine.offload != "none" else optimizer / (world if zero >= 1 else 1) / GIB,
        # On a CPU what no gradient fills is not there, so a small model's bucket is as small as the model.
        buffers=(len(trained) * BUCKET if half else min(p, len(trained) * BUCKET)) * staged * bool(zero) / GIB,
        frozen=frozen / (world if zero == 3 else 1) * width / GIB,
        activations=sum(_activations(stage, size, width) for size in trained) / GIB,
        logits=0.0 if stage.objective.is_scalar else _logits(stage, policy, width) / GIB,
        generation=_generation(stage, policy, width, world) / GIB,
    )


def _on_base(size: ModelSize, base: ModelSize, rank: int) -> ModelSize:
    """What a model adds to the memory of a stage with adapters: one of the same shape is an adapter on its base."""
    same = (size.hidden, size.layers, size.linear) == (base.hidden, base.layers, base.linear)
    return replace(size, parameters=rank * size.linear) if same else size


@contextmanager
def named_memory(stage: Stage, locate: Callable[[str], str], processes: int) -> Iterator[None]:
    """Say of memory that runs out while a stage is trained what the largest parts of it are, and what makes them less.

    `locate` gives what is loaded for a path of the recipe.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        try:
            policy = model_size(locate(stage.model.path), scalar=stage.objective.is_scalar)
            others = {
                role: model_size(locate(path), scalar=stage.objective.needs[role].is_scalar)
                for role, path in stage.models.items()
                if not is_code(path)
            }
        except UserError:  # a configuration on the Hub, say: what happened is more important
            raise error from None
        needed = memory(stage, policy, others, processes)
        first, second, *_ = sorted(_remedies(stage, needed), reverse=True)
        largest = [first, second] if second[0] > first[0] / 4 else [first]
        parts = " and ".join(f"{what} ({gib:.2f})" for gib, what, _ in largest)
        advice = ", or ".join(dict.fromkeys(one for *_, remedies in largest for one in remedies))
        verb = "is" if len(largest) == 1 else "are"
        raise MissingError(
            f"stage {stage.name}: there is not enough memory for its {needed.total:.2f} GiB a process (estimated), of "
            f"which {parts} {verb} the most: {advice}; then the same command goes on from the last checkpoint"
        ) from error


def _remedies(stage: Stage, needed: Memory) -> list[tuple[float, str, list[str]]]:
    """GiB, name, and what of the recipe makes it less, of each part that can be the largest."""
    engine, model = stage.engine, stage.model
    spread = [f"raise engine.zero_stage to {stop} with more processes" for stop in (2, 3) if engine.zero_stage < stop]
    states = [*spread[-1:], *(["set engine.offload: optimizer"] if engine.offload == "none" else [])]
    shorter = "lower data.max_prompt_length and data.max_response_length"
    micro = ["lower train.micro_batch_size"] if stage.train.micro_batch_size > 1 else []
    again = [] if model.gradient_checkpointing else ["set model.gradient_checkpointing: true"]
    sampled = ["lower rollout.batch_size or rollout.max_new_tokens"]
    once = not stage.on_policy and not engine.teacher_cache and stage.models
    cached = ["set engine.teacher_cache: true"] if once else []
    smaller = ["take a smaller model"]
    return [
        (needed.weights, "weights", spread[-1:] or smaller),
        (needed.gradients, "gradients", spread[-1:] or smaller),
        (needed.optimizer, "optimizer", states or smaller),
        (needed.buffers, "DeepSpeed's buffers", ["lower engine.deepspeed.zero_optimization.reduce_bucket_size"]),
        (needed.frozen, "frozen models", [*cached, *spread[-1:]] or smaller),
        (needed.activations, "activations", micro + again or [shorter]),
        (needed.logits, "logits", ["lower engine.chunk_tokens"]),
        (needed.generation, "the sampling's keys and values", sampled),
    ]


def _activations(stage: Stage, size: ModelSize, width: int) -> float:
    rows = stage.train.micro_batch_size * _rows_each(stage.objective.data)
    tokens = rows * (stage.data.max_prompt_length + _longest_response(stage))
    # Inputs and outputs of the products, four of them as wide as the feed-forward layer; the norms' input in float32.
    layer = width * (6 * size.hidden + 4 * size.intermediate + 2 * size.kv_width) + 2 * 4 * size.hidden
    kept = width * size.hidden * size.layers + layer if stage.model.gradient_checkpointing else layer * size.layers
    return tokens * (kept + (4 + width) * size.hidden)


def _logits(stage: Stage, size: ModelSize, width: int) -> float:
    chunk = stage.engine.chunk_tokens
    tokens = chunk_size(size.vocab) if chunk == "auto" else chunk
    whole = sum(need is Need.DISTRIBUTION for need in stage.objective.needs.values())
    head = size.vocab * size.hidden * (4 if width == 4 else 4 + width)
    return 4 * size.vocab * tokens * max(2, 1 + 2 * whole) + head


def _generation(stage: Stage, size: ModelSize, width: int, world: int) -> float:
    if stage.rollout is None:
        return 0.0
    share = (stage.rollout.responses or stage.train.batch_size) // world
    rows = min(stage.rollout.batch_size or stage.train.micro_batch_size, max(1, share))
    tokens = rows * (stage.data.max_prompt_length + stage.rollout.max_new_tokens)
    # Beside the cache, a few float32 rows over the vocabulary: logits, log-softmax and noise.
    return tokens * 2 * size.layers * size.kv_width * width + rows * size.vocab * 4 * 4


def cost(stage: Stage, examples: Examples) -> Cost:
    """What the stage takes of these examples."""
    steps, responses = _steps(stage, len(examples))
    lengths = [
        sum(len(row.prompt_ids) + len(row.response_ids) for row in examples.rows(i)) for i in range(len(examples))
    ]
    tokens = round(sum(lengths) / len(lengths) * stage.train.batch_size * steps)
    return Cost(len(examples), examples.kind, steps, tokens, responses * _longest_response(stage), exact=True)


def cost_at_most(stage: Stage) -> Cost | None:
    """The same without reading tokens, from numbers of rows and the recipe's limits; None where rows are not known."""
    kind = DataKind.PROMPTS if stage.on_policy else stage.objective.data
    rows = [_rows_at_most(source) for source in stage.data.train]
    if None in rows:
        return None
    each = 2 if kind is DataKind.UNPAIRED else 1
    weighted = zip(rows, stage.data.train, strict=True)
    examples = max(1, sum(round(each * (count or 0) * source.weight) for count, source in weighted))
    steps, responses = _steps(stage, examples)
    length = stage.data.max_prompt_length + (0 if stage.on_policy else stage.data.max_response_length)
    tokens = _rows_each(kind) * length * stage.train.batch_size * steps
    return Cost(examples, kind, steps, tokens, responses * _longest_response(stage), exact=False)


def _rows_at_most(source: Source) -> int | None:
    known = KNOWN_ROWS.get((source.path, source.split))
    if known is not None:
        return min(known, source.limit or known)
    try:
        return len(load_rows(source))
    except ServiceError:
        return None


def _steps(stage: Stage, examples: int) -> tuple[int, int]:
    """Optimizer steps, and the responses that they sample."""
    schedule = Schedule.of(stage, examples)
    if stage.rollout is None:
        return schedule.total_steps, 0
    responses = stage.rollout.responses or stage.train.batch_size
    return schedule.total_steps, -(-schedule.total_steps // schedule.steps_of_a_batch) * responses


def _rows_each(kind: DataKind) -> int:
    return 2 if kind is DataKind.PAIRS else 1


def _longest_response(stage: Stage) -> int:
    return stage.data.max_response_length if stage.rollout is None else stage.rollout.max_new_tokens
