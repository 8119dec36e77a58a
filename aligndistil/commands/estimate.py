"""What a stage will take: steps, tokens, operations, and what to say where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from aligndistil.batch import DataKind
from aligndistil.data import Examples, load_rows
from aligndistil.errors import MissingError, ServiceError, UserError, out_of_memory
from aligndistil.models import ModelSize
from aligndistil.objectives.base import Prepares, Role
from aligndistil.recipe import Source, Stage
from aligndistil.training.batches import Schedule
from aligndistil.training.memory import Memory, Models, longest_response, memory, models_of, rows_each

KNOWN_ROWS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
}
"""Rows by path and split of the data that shipped recipes name, for planning where the Hub cannot be reached."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage reads and samples."""

    examples: int
    kind: DataKind
    steps: int
    tokens: int
    """Prompt and response tokens that the steps read from the data."""
    responses: int
    """The response tokens among them."""
    sampled: int
    """Response tokens that are sampled at most."""
    exact: bool
    """False when the data were not at hand: rows are then all usable, and as long as the recipe allows."""


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
            models = models_of(stage, locate)
        except UserError:  # a configuration on the Hub, say: what happened is more important
            raise error from None
        card = torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else None
        needed = memory(stage, models, processes, device="cpu" if card is None else "cuda", card=card)
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
    if stage.train.micro_batch_tokens is not None:
        micro = ["lower train.micro_batch_tokens"]
    again = [] if model.gradient_checkpointing else ["set model.gradient_checkpointing: true"]
    sampled = ["lower rollout.batch_size or rollout.max_new_tokens"]
    nothing = stage.objective.prepares is Prepares.NOTHING
    once = not stage.on_policy and nothing and not engine.teacher_cache and stage.models
    cached = ["set engine.teacher_cache: true"] if once else []
    smaller = ["take a smaller model"]
    return [
        (needed.weights, "weights", spread[-1:] or smaller),
        (needed.gradients, "gradients", spread[-1:] or smaller),
        (needed.optimizer, "optimizer", states or smaller),
        (needed.buffers, "DeepSpeed's buffers", ["lower engine.deepspeed.zero_optimization.reduce_bucket_size"]),
        (needed.frozen, "frozen models", [*cached, *spread[-1:]] or smaller),
        (needed.activations, "activations", micro + again or [shorter]),
        (needed.update, "the optimizer's step", states or smaller),
        (needed.head, "logits", ["lower engine.chunk_tokens"]),
        (needed.rollout, "the sampling's keys and values", sampled),
    ]


def cost(stage: Stage, examples: Examples) -> Cost:
    """What the stage takes of these examples."""
    steps, responses = _steps(stage, len(examples))
    rows = [row for i in range(len(examples)) for row in examples.rows(i)]
    prompt, response = sum(len(row.prompt_ids) for row in rows), sum(len(row.response_ids) for row in rows)
    seen = stage.train.batch_size * steps / len(examples)
    sampled = responses * longest_response(stage)
    tokens = round((prompt + response) * seen)
    return Cost(len(examples), examples.kind, steps, tokens, round(response * seen), sampled, exact=True)


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
    read = rows_each(kind) * stage.train.batch_size * steps
    response = 0 if stage.on_policy else read * stage.data.max_response_length
    tokens = read * stage.data.max_prompt_length + response
    return Cost(examples, kind, steps, tokens, response, responses * longest_response(stage), exact=False)


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


def operations(stage: Stage, models: Models, taken: Cost) -> float:
    """Floating-point operations of a stage on all its processes, where samples are as long as they may be.

    A forward pass multiplies each token with each weight (two operations), a backward pass does so twice, or once where
    the weights are frozen under adapters; the head sees response tokens alone, and attention half of its square.
    """
    objective, rollout, steps = stage.objective, stage.rollout, taken.steps
    rows = stage.train.batch_size * steps * rows_each(objective.data if rollout is None else DataKind.RESPONSES)
    responses = taken.responses if rollout is None else rows * rollout.max_new_tokens
    tokens = taken.tokens + (0 if rollout is None else responses)
    length = tokens / rows

    def body(size: ModelSize, tokens: float) -> float:
        return tokens * (2 * size.body + 2 * length * size.q_width * size.layers)

    def forward(size: ModelSize, share: float) -> float:
        return share * (body(size, tokens) + 2 * size.head * responses)

    # An objective that prepares reads each rollout, or each batch, once more before its first gradient.
    prepared = 0.0 if objective.prepares is Prepares.NOTHING else 1 / (rollout.epochs if rollout else 1)
    total = 0.0
    for role, size in {Role.POLICY: models.policy, **models.others}.items():
        if role not in (Role.POLICY, Role.CRITIC):
            total += forward(size, prepared + (role in objective.update_needs))
            continue
        lora = stage.model.lora is not None
        passes = (2 if lora else 3) + stage.model.gradient_checkpointing
        total += (
            forward(size, prepared) + passes * body(size, tokens) + (2 + 2 * (not lora) + 2) * size.head * responses
        )
    if taken.sampled and rollout is not None:
        prompts = taken.tokens / rows * taken.sampled / rollout.max_new_tokens
        total += body(models.policy, prompts + taken.sampled) + 2 * models.policy.head * taken.sampled
    return total
