"""The memory that a stage takes, from its recipe and the shapes of its models: a pure function, checked as it trains.

Memory is what one process holds at the fullest moment of a step. Model states are counted exactly; activations are the
tensors that autograd keeps of a Llama-like decoder whose attention matrix sdpa does not keep. What is left out: the
CUDA context, workspaces of the kernels, and the fragmentation of the allocator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch

from aligndistil.batch import DataKind
from aligndistil.engine.memory import peak_memory_gib
from aligndistil.engine.processes import Processes
from aligndistil.engine.rows import sharing_pays
from aligndistil.engine.token_terms import KEPT_BYTES, KEPT_SHARE, chunk_size
from aligndistil.models import ModelSize, model_size, pick_dtype, whole_base_of
from aligndistil.objectives.base import Need, Prepares, Role
from aligndistil.recipe import Stage
from aligndistil.training.python_reward import is_code

logger = logging.getLogger(__name__)

GIB = 2**30
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once (its default `reduce_bucket_size`); it allocates all of it."""
LIVE = 1_000_000_000
"""Parameters of a model that ZeRO-3 keeps gathered at once (its default `stage3_max_live_parameters`)."""

CARD = 80.0
"""GiB of the card that is estimated for where none is named: chunks are larger on a larger one."""

COARSE = 0.1
"""GiB below which the resident memory of a process on a CPU says nothing of a stage."""

_TRAINED = (Role.POLICY, Role.CRITIC)

Device: TypeAlias = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class Models:
    """The shapes of a stage's models."""

    policy: ModelSize
    others: Mapping[str, ModelSize] = field(default_factory=dict)
    """Of each role that is a model."""
    bases: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Of each role, the policy too, the weights that its adapters are trained on, and the parameters of these."""

    @property
    def roles(self) -> dict[str, ModelSize]:
        """All of them, the policy first."""
        return {Role.POLICY: self.policy, **self.others}


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
    head: float
    """The logits of one chunk of response tokens, with the gradient of the head."""
    rollout: float
    """The keys and values of sampling, before there are activations or gradients."""
    update: float
    """What DeepSpeed and the optimizer need beside gradients once the activations have gone."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are there beside the activations of the next."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.buffers + self.frozen + max(self._moments)

    @property
    def is_of_update(self) -> bool:
        """Whether the optimizer's step is the fullest moment."""
        return self._moments[2] == max(self._moments)

    @property
    def _moments(self) -> tuple[float, float, float]:
        """Beside what is always there: sampling, the backward pass as it begins, the optimizer's step."""
        backward = self.activations + self.head + self.gradients * self.accumulates
        return self.rollout, backward, self.gradients + self.update

    def first_step(self) -> Memory:
        """The same where the optimizer makes its moments in the first update."""
        return replace(self, optimizer=0.0, update=self.update + self.optimizer)


def models_of(
    stage: Stage, locate: Callable[[str], str], base: Callable[[str], tuple[str, int]] | None = None
) -> Models:
    """The shapes of a stage's models.

    `locate` gives, for a path of the recipe, one whose configuration can be read; `base` the weights that a path's
    adapters are trained on (without adapters, its own), and how many parameters these adapters have: by default what
    its folder says, and next to none.
    Raises as `model_size` does.
    """
    base = base or (lambda path: (whole_base_of(locate(path)), 0))
    objective, trust = stage.objective, stage.model.trust_remote_code

    def size(path: str, *, scalar: bool) -> ModelSize:
        return model_size(locate(path), scalar=scalar, trust_remote_code=trust)

    others = {
        role: size(path, scalar=objective.needs[role].is_scalar)
        for role, path in stage.models.items()
        if not is_code(path)
    }
    bases = {Role.POLICY: base(stage.model.path)} | {role: base(stage.models[role]) for role in others}
    return Models(size(stage.model.path, scalar=objective.is_scalar), others, bases)


def memory(
    stage: Stage,
    models: Models,
    processes: int,
    *,
    device: Device,
    card: float | None = None,
    tokens: int | None = None,
) -> Memory:
    """GiB per process on a CPU, or on a card of so many GiB; see the module for what is counted.

    `tokens` is the length of the longest row, prompt and response; by default the recipe's limits.
    """
    policy, objective, world = models.policy, stage.objective, processes
    width = 2 if in_half(stage, device, policy.hidden) else 4
    zero, part = stage.engine.zero_stage or int(width == 2), 1 / world
    trained = [size for role, size in models.roles.items() if role in _TRAINED]
    p = sum(_learnt(stage, size) for size in trained)
    weights, frozen = _parameters(stage, models)
    offload, largest = stage.engine.offload, policy.vocab * policy.hidden
    if zero == 3:  # the policy has gathered what its next layers need; frozen models do so in turn
        kept = 0 if offload == "parameters" else part
        weights, frozen = weights * kept + sum(min(size.parameters, LIVE) for size in trained), frozen * kept
    if stage.evaluation.kl_initial and not objective.is_scalar and stage.model.lora is None:
        frozen += policy.parameters
    # ZeRO keeps a float32 copy of the weights beside the optimizer's two moments; gradients are summed in float32.
    moments = p * (12 if zero else 8) * (part if zero else 1) * (offload == "none")
    gradients = p * 4 * (part if zero >= 2 else 1) * (offload == "none" or zero < 2)
    staged = (4 if zero == 1 else width) * bool(zero)
    # A card gives a bucket all of its memory before the backward pass, a CPU what gradients have filled of it.
    buckets = BUCKET * staged * len(trained) if device == "cuda" else 0
    filled = min(p, BUCKET) * staged if device == "cpu" else 0
    leaving = largest * width if offload != "none" and zero < 3 else 0  # the gradient that goes to the CPU
    length = tokens or stage.data.max_prompt_length + longest_response(stage)
    needed = Memory(
        weights=weights * width / GIB,
        gradients=gradients / GIB,
        optimizer=moments / GIB,
        buffers=(buckets + leaving) / GIB,
        frozen=frozen * width / GIB,
        activations=sum(_activations(stage, size, width, length, device) for size in trained) / GIB,
        head=0.0,
        rollout=_rollout(stage, policy, width, world) / GIB,
        # ZeRO makes one flat tensor of the gradients; AdamW is fused, and needs nothing.
        update=max(filled, 4 * min(p * part, LIVE if zero == 3 else p) * (zero > 0 and offload == "none")) / GIB,
        accumulates=stage.train.batch_size * rows_each(objective.data) > micro_batch_rows(stage, length) * world,
    )
    if objective.is_scalar:
        return needed
    room = (card or CARD) * GIB
    free = KEPT_BYTES if device == "cpu" else KEPT_SHARE * max(0.0, room - GIB * needed.total)
    return replace(needed, head=_head(stage, policy, width, device, length, room, free) / GIB)


def in_half(stage: Stage, device: Device, hidden: int) -> bool:
    """Whether a stage with a model of this width computes in bfloat16 there."""
    if stage.model.dtype == "auto":
        return device == "cuda" or pick_dtype("auto", hidden) == torch.bfloat16
    return stage.model.dtype == "bfloat16"


def rows_each(kind: DataKind) -> int:
    """Rows of one example."""
    return 2 if kind is DataKind.PAIRS else 1


def longest_response(stage: Stage) -> int:
    return stage.data.max_response_length if stage.rollout is None else stage.rollout.max_new_tokens


def _parameters(stage: Stage, models: Models) -> tuple[float, float]:
    """Of the models that are trained, and of the frozen ones: under adapters, each base is there once."""
    counted = set[str]()
    totals = {True: 0, False: 0}
    for role, size in models.roles.items():
        trained = role in _TRAINED
        if stage.model.lora is not None:
            base, adapters = models.bases.get(role, (role, 0))
            totals[trained] += _learnt(stage, size) if trained else adapters
            if base in counted:  # a scalar head stands on the body of the language model
                totals[trained] += size.head * (size.scalar and not trained)
                continue
            counted.add(base)
        cached = stage.engine.teacher_cache and not trained and not size.scalar
        totals[trained] += size.head if cached else size.parameters
    return totals[True], totals[False]


def _learnt(stage: Stage, size: ModelSize) -> int:
    """Parameters that are trained of a model."""
    lora = stage.model.lora
    if lora is None:
        return size.parameters
    return size.adapters(lora.r, lora.target_modules) + (size.head if size.scalar else 0)


def micro_batch_rows(stage: Stage, length: int) -> int:
    """Rows of a micro-batch in which all are so long."""
    each, tokens = rows_each(stage.objective.data), stage.train.micro_batch_tokens
    examples = stage.train.micro_batch_size if tokens is None else max(1, tokens // (each * length))
    return each * min(examples, stage.train.batch_size)


def _activations(stage: Stage, size: ModelSize, width: int, length: int, device: Device) -> float:
    rows = micro_batch_rows(stage, length)
    tokens = rows * length
    if stage.objective.data is DataKind.PAIRS and stage.engine.share_prompts == "auto":
        prompt, response = stage.data.max_prompt_length, stage.data.max_response_length
        together = round(length * (prompt + 2 * response) / (prompt + response))
        if sharing_pays([together] * (rows // 2), tokens, length, hidden=size.hidden, device=device):
            tokens = rows // 2 * together
    # Inputs and outputs of the products, four of them as wide as the feed-forward layer; the norms' input in float32.
    layer = width * (6 * size.hidden + 4 * size.intermediate + 2 * size.kv_width) + 2 * 4 * size.hidden
    kept = width * size.hidden * size.layers + layer if stage.model.gradient_checkpointing else layer * size.layers
    return tokens * (kept + (4 + width) * size.hidden)


def _head(stage: Stage, size: ModelSize, width: int, device: Device, length: int, card: float, keeps: float) -> float:
    """Bytes on a card of so many, where softmaxes may be kept in so many."""
    objective, trained = stage.objective, stage.model.lora is None
    rows = micro_batch_rows(stage, length)
    responses = rows * min(length, longest_response(stage))
    tokens = min(chunk_tokens(stage, size, device, card), responses)
    needs = objective.update_needs
    whole = sum(need is Need.DISTRIBUTION for need in needs.values())
    logits = 4 * size.vocab * tokens * max(2, 1 + 2 * whole)
    # The gradient of a loss of several examples together is taken in the backward pass, with what was kept for it.
    together = objective.prepares is not Prepares.NOTHING or rows > rows_each(objective.data) == 2
    kept = min(4.0 * size.vocab * responses, keeps) * (together and needs[Role.POLICY] is Need.LOGP)
    # It is summed in float32, and in bfloat16 copied at the end; a CPU widens the weights for each product.
    widened = 4 * size.head * (width == 2 and device == "cpu")
    summed = 4 * size.head * trained
    return max(logits + widened + summed, (4 + width * (width == 2)) * size.head * trained) + kept


def chunk_tokens(stage: Stage, size: ModelSize, device: Device, card: float) -> int:
    """Response tokens that are projected at once there, on a card of so many bytes."""
    chunk = stage.engine.chunk_tokens
    return chunk_size(size.vocab, device, memory=int(card)) if chunk == "auto" else chunk


def _rollout(stage: Stage, size: ModelSize, width: int, world: int) -> float:
    if stage.rollout is None:
        return 0.0
    share = (stage.rollout.responses or stage.train.batch_size) // world
    longest = stage.data.max_prompt_length + stage.rollout.max_new_tokens
    rows = min(stage.rollout.batch_size or micro_batch_rows(stage, longest), max(1, share))
    tokens = rows * longest
    # Beside the cache, a few rows over the vocabulary: logits and what is chosen in float32, probabilities and their
    # sums in float64.
    return tokens * 2 * size.layers * size.kv_width * width + rows * size.vocab * (3 * 4 + 2 * 8)


class MemoryCheck:
    """Compares the estimate with what a stage really takes."""

    def __init__(self, stage: Stage, models: Models, processes: Processes, held: float) -> None:
        """`held` are the GiB that the process held before the stage began."""
        self._stage, self._models, self._processes, self._held = stage, models, processes, held
        self._estimate = 0.0
        self._compared = False

    def after_step(self, step: int, tokens: int) -> dict[str, float]:
        """The estimate for the longest rows so far, after so many optimizer steps, of which the last had `tokens`.

        The first call compares it with the peak, and says both in the log.
        """
        device: Device = "cuda" if self._processes.device.type == "cuda" else "cpu"
        card = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
        needed = memory(self._stage, self._models, self._processes.world, device=device, card=card, tokens=tokens)
        self._estimate = max(self._estimate, needed.total)
        if not self._compared:
            self._compared = True
            lazy = (
                step == 1
                and not self._stage.engine.zero_stage
                and not in_half(self._stage, device, self._models.policy.hidden)
            )
            self._compare((needed.first_step() if lazy else needed).total, tokens, device)
        return {"perf/estimated_memory_gib": self._estimate}

    def _compare(self, estimate: float, tokens: int, device: Device) -> None:
        measured = peak_memory_gib() - self._held
        if not self._processes.is_main or (device == "cpu" and estimate < COARSE):
            return
        off = estimate / measured - 1 if measured > 0 else 0.0
        meter = "allocated on the card" if device == "cuda" else "resident, above what was held before the stage"
        logger.log(
            logging.WARNING if device == "cuda" and abs(off) > 0.25 else logging.INFO,
            "stage %s: the first step, with rows of up to %d tokens, took %.2f GiB (%s); estimated were %.2f GiB "
            "(%+.0f %%)",
            self._stage.name,
            tokens,
            measured,
            meter,
            estimate,
            100 * off,
        )
