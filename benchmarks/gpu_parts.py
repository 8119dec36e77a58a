"""The parts of gpu.py, each run by it as a process of its own: `python gpu_parts.py PART JSON`, which prints JSON.

Every part makes its own random weights and rows on the device: no network, no file. `engine_of` is the only place that
knows how our engine is built.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from heads import OBJECTIVES, Inputs, LigerCrossEntropy, LigerDPO, Products, make_inputs, ours, product_operations
from meter import machine, now, peak, start_of_peak
from shapes import Asked, random_model

from aligndistil import recipe
from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.compilation import compiles_head
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import start_processes
from aligndistil.objectives.base import Objective, Role

WARM_UP = 2
"""Steps that are not counted: the first makes the optimizer's states, and kernels are chosen and compiled."""
LEARNING_RATE = 1e-5
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PEERS: dict[str, Callable[[Inputs], Callable[[Inputs], float]]] = {"dpo": LigerDPO, "sft": LigerCrossEntropy}
"""Heads of others, by objective."""


def measure_ceilings(asked: Asked) -> dict[str, Any]:
    """Operations a second of the products at the body's and the head's shapes, bytes a second of a copy, memory."""
    tokens, shape, device = asked.micro_rows * asked.tokens, asked.sizes, asked.device

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=DTYPES[asked.dtype])

    layer = [(matrix(tokens, width), matrix(width, out), matrix(tokens, out)) for width, out in shape.products]

    def body() -> None:
        for states, weight, out in layer:
            torch.mm(states, weight, out=out)

    given = head_inputs(asked, "sft")
    products = Products(given)
    numbers = torch.empty(2**28 if device == "cuda" else 2**24, device=device, dtype=torch.float32)
    copied = torch.empty_like(numbers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "device": machine(device, asked.dtype),
        "memory_gib": memory / 2**30,
        "body": 2 * tokens * sum(width * out for width, out in shape.products) / seconds_of(asked, body),
        "head": product_operations(given) / seconds_of(asked, lambda: products(given)),
        "bandwidth": 2 * numbers.nbytes / seconds_of(asked, lambda: copied.copy_(numbers)),
    }


def seconds_of(asked: Asked, work: Callable[[], Any]) -> float:
    """Median of several repetitions, after as many as warm up."""
    for _ in range(WARM_UP):
        work()
    taken = []
    for _ in range(max(3, asked.steps)):
        began = now(asked.device)
        work()
        taken.append(now(asked.device) - began)
    return statistics.median(taken)


def head_inputs(asked: Asked, name: str) -> Inputs:
    """Of one micro-batch."""
    sizes = {"rows": asked.micro_rows, "tokens": asked.micro_rows * asked.response}
    shape = {"vocab": asked.sizes.vocab, "hidden": asked.sizes.hidden}
    return make_inputs(OBJECTIVES[name], **sizes, **shape, device=asked.device, dtype=DTYPES[asked.dtype])


def measure_heads(asked: Asked) -> dict[str, Any]:
    """For each objective and side: seconds, peak GiB above the inputs, loss; or why a side was not measured."""
    found: dict[str, Any] = {}
    for name in OBJECTIVES:
        given = head_inputs(asked, name)
        found[f"{name}/products"] = measure_head(asked, given, Products(given))
        compiled = compiles_head(recipe.Engine(), torch.device(asked.device))  # as a recipe's stage does it
        found[f"{name}/ours"] = measure_head(asked, given, partial(ours, compiled=compiled))
        if name in PEERS:
            try:
                found[f"{name}/Liger"] = measure_head(asked, given, PEERS[name](given))
            except Exception as error:  # whatever a peer meets here, ours has been measured
                found[f"{name}/Liger"] = {"missing": reason(error)}
        del given
        if asked.device == "cuda":
            torch.cuda.empty_cache()
    return found


def measure_head(asked: Asked, given: Inputs, head: Callable[[Inputs], float]) -> dict[str, float]:
    losses: list[float] = []

    def work() -> None:
        given.forget_gradients()
        losses.append(head(given))

    seconds = seconds_of(asked, work)
    given.forget_gradients()
    before = start_of_peak(asked.device)
    work()
    return {"seconds": seconds, "gib": (peak(asked.device) - before) / 2**30, "loss": losses[-1]}


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first}"


def random_rows(asked: Asked) -> Iterator[tuple[Row, Row]]:
    """Pairs that share their prompt; all rows are equally long, so that none is padded."""
    drawn = random.Random(0)

    def ids(count: int) -> list[int]:
        return [drawn.randrange(asked.sizes.vocab) for _ in range(count)]

    for _ in range(asked.rows // 2):
        prompt = ids(asked.tokens - asked.response)
        yield Row(prompt, ids(asked.response)), Row(prompt, ids(asked.response))


def engine_of(asked: Asked, objective: Objective) -> Engine:
    """Our engine as a stage builds it, with random weights; DPO's reference is what the policy starts from."""
    frozen = [role for role in objective.needs if role != Role.POLICY]
    seeds = {role: 0 if role == Role.REFERENCE else seed for seed, role in enumerate(frozen, start=1)}
    dtype = DTYPES[asked.dtype]
    rows_each = 2 if objective.data is DataKind.PAIRS else 1
    train = {
        "batch_size": asked.rows // rows_each,
        "micro_batch_size": asked.micro_rows // rows_each,
        "max_steps": WARM_UP + asked.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
    }
    return Engine(
        random_model(asked.sizes, 0, asked.device, dtype),
        {role: random_model(asked.sizes, seed, asked.device, dtype) for role, seed in seeds.items()},
        objective,
        train=recipe.Train.model_validate(train),
        settings=recipe.Engine(zero_stage=0),
        processes=start_processes(),
        total_steps=WARM_UP + asked.steps,
        vocab=asked.sizes.vocab,
    )


def micro_batches(asked: Asked, kind: DataKind) -> list[Batch]:
    rows = [row for pair in random_rows(asked) for row in pair]
    starts = range(0, asked.rows, asked.micro_rows)
    return [collate(rows[start : start + asked.micro_rows], kind, pad_id=0) for start in starts]


def measure_ours(asked: Asked, name: str) -> dict[str, Any]:
    """A whole step of ours: the turn of training/loop.py without data and log."""
    objective = OBJECTIVES[name]
    engine, batches = engine_of(asked, objective), micro_batches(asked, objective.data)
    examples = sum(batch.examples for batch in batches)
    steps = Steps(asked)
    for _ in range(WARM_UP + asked.steps):
        losses = []
        for batch in batches:
            loss = engine.loss(batch, {})
            engine.backward(loss, examples=examples, last=batch is batches[-1])
            losses.append(loss.per_example.detach().sum())
        steps.losses.append(float(sum(losses)) / examples)
        steps.norms.append(engine.step()["grad_norm"])
        steps.done()
    engine.close()
    return steps.result()


class Steps:
    """Seconds between the ends of steps, and the highest memory in the process after the warm-up."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._ends = asked, [now(asked.device)]
        self.losses: list[float] = []
        self.norms: list[float] = []

    def done(self) -> None:
        self._ends.append(now(self._asked.device))
        if len(self._ends) == WARM_UP + 1:
            start_of_peak(self._asked.device)
            self._ends[-1] = now(self._asked.device)

    def result(self) -> dict[str, Any]:
        ends = self._ends[WARM_UP:]
        return {
            "seconds": statistics.median(after - before for before, after in pairwise(ends)),
            "gib": peak(self._asked.device) / 2**30,
            "losses": self.losses,
            "norms": self.norms,
        }


def measure_trl(asked: Asked, weights: str) -> dict[str, Any]:
    """TRL's DPO with its own defaults but for recomputed activations, which ours does without as well.

    `weights` is their dtype: with float32 TRL computes in `asked.dtype` by autocast, and keeps float32 weights as ours.
    """
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    from aligndistil.models import load_tokenizer

    steps = Steps(asked)

    class OnTokens(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.done()

    pairs = [
        {"prompt_ids": a.prompt_ids, "chosen_ids": a.response_ids, "rejected_ids": b.response_ids}
        for a, b in random_rows(asked)
    ]
    frozen = "bfloat16" if "bfloat16" in (weights, asked.dtype) else "float32"
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            max_steps=WARM_UP + asked.steps,
            per_device_train_batch_size=asked.micro_rows // 2,
            gradient_accumulation_steps=asked.rows // asked.micro_rows,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=asked.tokens,
            bf16=asked.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=asked.device == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = OnTokens(
            model=random_model(asked.sizes, 0, asked.device, DTYPES[weights]),
            ref_model=random_model(asked.sizes, 0, asked.device, DTYPES[frozen]),
            args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=load_tokenizer("builtin:tiny", recipe.Model(path="builtin:tiny")),
            callbacks=[Clock()],
        )
        trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    steps.losses, steps.norms = [line["loss"] for line in logs], [float(line["grad_norm"]) for line in logs]
    return steps.result()


PARTS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "head": lambda asked: {"ceilings": measure_ceilings(asked), "heads": measure_heads(asked)},
    "ours dpo": lambda asked: measure_ours(asked, "dpo"),
    "ours aligndistil": lambda asked: measure_ours(asked, "aligndistil"),
    "trl bfloat16": lambda asked: measure_trl(asked, "bfloat16"),
    "trl float32": lambda asked: measure_trl(asked, "float32"),
}


def main() -> None:
    part, asked = sys.argv[1], Asked(**json.loads(sys.argv[2]))
    # What libraries print must not be taken for the result.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        found = PARTS[part](asked)
    except (ModuleNotFoundError, torch.OutOfMemoryError) as error:
        found = {"missing": reason(error)}
    assert all(math.isfinite(loss) for loss in found.get("losses", []))
    print(json.dumps(found), file=channel, flush=True)


if __name__ == "__main__":
    main()
