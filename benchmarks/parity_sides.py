"""The sides of parity_trl.py, each run by it as a process of its own: `python parity_sides.py SIDE FOLDER`.

Two of them train the same model on the same rows in turns: a side stops when the gradient of a step is there, says so,
and waits for its next turn. What lies between two such moments is one whole step (optimizer, log, data, forward and
backward pass), and that is what is measured. All they read is in FOLDER; the result is FOLDER/SIDE.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

Kind = Literal["pairs", "unpaired", "responses"]
SEED = 0
NO_LIMIT = 10**6
"""Tokens; the rows have been chosen to fit, so nothing is cut."""


@dataclass(frozen=True, slots=True)
class Case:
    """One objective, with settings that mean the same on both sides."""

    kind: Kind
    objective: dict[str, Any]
    """As a recipe writes it."""
    peer: str
    """The side that ours is compared with: TRL, or plain PyTorch where TRL has no such trainer."""
    trainer: str
    """TRL's trainer, and its configuration beside what all trainers share."""
    options: dict[str, Any]
    frozen: dict[str, str]
    """Frozen models by their role, as folders."""
    start: str
    """The folder of the model that is trained."""
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    tolerance: float
    """How far a loss may be from the other side's, relative to the first one."""
    order: list[list[int]] = field(default_factory=list)
    """Rows of the data file for each step, in the order in which our sampler draws them."""

    @property
    def rows(self) -> int:
        return self.steps * self.batch_size


CASES: dict[str, dict[str, Any]] = {
    "dpo": {
        "kind": "pairs",
        "objective": {"name": "dpo", "beta": 0.1},
        "peer": "trl",
        "trainer": "DPO",
        "options": {"beta": 0.1},
        "frozen": {"reference": "model"},
        "start": "model",
    },
    "simpo": {
        "kind": "pairs",
        "objective": {"name": "simpo", "beta": 10.0, "simpo_gamma": 5.0},
        "peer": "trl",
        "trainer": "CPO",
        "options": {"beta": 10.0, "simpo_gamma": 5.0, "loss_type": "simpo", "cpo_alpha": 0.0},
        "frozen": {},
        "start": "model",
    },
    "kto": {
        "kind": "unpaired",
        "objective": {"name": "kto", "beta": 0.1},
        "peer": "trl",
        "trainer": "KTO",
        "options": {"beta": 0.1},
        "frozen": {"reference": "model"},
        "start": "model",
    },
    "reward_model": {
        "kind": "pairs",
        "objective": {"name": "reward_model"},
        "peer": "trl",
        "trainer": "Reward",
        "options": {},
        "frozen": {},
        "start": "scalar",
    },
    "aligndistil": {
        "kind": "responses",
        "objective": {"name": "aligndistil", "r": 5.0},
        "peer": "plain",
        "trainer": "",
        "options": {},
        "frozen": {"teacher": "teacher", "reverse_teacher": "reverse"},
        "start": "model",
    },
}


@dataclass(slots=True)
class Result:
    """What a side has seen and done."""

    versions: dict[str, str]
    before_mib: float
    """Resident memory when the libraries are imported and no weight is loaded."""
    seconds: list[float] = field(default_factory=list)
    """Wall time of the steps; the first, which makes the optimizer's states, is not among them."""
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    """Tokens, padding included, that went through the body of any model in these steps."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    reference_points: list[float] = field(default_factory=list)
    """KTO's z0, clamped."""
    seen: list[list[Any]] = field(default_factory=list)
    """For each step, sorted: what the row is, its token ids, and how many of them belong to the response (0 where the
    side does not say)."""


class Turns:
    """Waits for its turn at every step's boundary, and measures from turn to turn without the waiting.

    It is called once a step, when the gradient is there; our loop does so by asking whether it is to stop.
    """

    def __init__(self, case: Case, folder: Path, result: Result, channel: Any) -> None:
        self.result, self._channel = result, channel
        self._began: tuple[float, float, int] | None = None
        self._tokens = 0
        self._count_tokens(json.loads((folder / case.start / "config.json").read_text())["vocab_size"])

    def _count_tokens(self, vocab: int) -> None:
        from torch.nn import Embedding

        forward = Embedding.forward

        def counted(module: Any, ids: Any) -> Any:
            if module.num_embeddings == vocab:
                self._tokens += ids.numel()
            return forward(module, ids)

        Embedding.forward = counted

    def __call__(self) -> None:
        if self._began is not None:
            wall, processor, tokens = self._began
            self.result.seconds.append(time.perf_counter() - wall)
            self.result.cpu_seconds.append(time.process_time() - processor)
            self.result.peak_mib.append(_status_mib("VmHWM"))
            self.result.computed_tokens.append(self._tokens - tokens)
        print("ready", file=self._channel, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("parity_trl.py is gone")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._began = time.perf_counter(), time.process_time(), self._tokens

    @property
    def requested(self) -> bool:
        self()
        return False

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def run_ours(case: Case, folder: Path, channel: Any) -> Result:
    import deepspeed  # noqa: F401  (so that its memory counts as a library's)
    import torch
    import transformers

    from aligndistil.engine.processes import start_processes
    from aligndistil.recipe import load_recipe
    from aligndistil.run_folder import StageFolder
    from aligndistil.training import StageTraining
    from aligndistil.training.batches import mismatched

    result = Result({"torch": torch.__version__, "transformers": transformers.__version__}, _status_mib("VmRSS"))
    stage = load_recipe(folder / "recipe.yaml").stages["parity"]
    stage_folder = StageFolder(folder / "ours")
    training = StageTraining(stage, stage_folder, lambda path: path, start_processes())
    stop: Any = Turns(case, folder, result, channel)
    training.run(stop)
    lines = [line for line in stage_folder.metrics.read() if line["split"] == "train"]
    result.losses = [line["loss"] for line in lines]
    result.grad_norms = [line["grad_norm"] for line in lines]
    result.reference_points = [line["kl/z0"] for line in lines if "kl/z0" in line]
    for step in range(case.steps):
        rows = [row for i in training.schedule.sampler.batch(step) for row in training.data.train.rows(i)]
        if case.kind == "responses":
            told = [("chosen", row) for row in rows]
        elif case.kind == "pairs":
            told = [(name, row) for name, row in zip(("chosen", "rejected") * (len(rows) // 2), rows, strict=True)]
        else:
            told = [("desirable" if row.label else "undesirable", row) for row in rows]
            told += [("mismatched", row) for row in mismatched(rows) or []]
        counts = [0 if case.trainer == "Reward" else len(row.response_ids) for _, row in told]
        seen = [(name, [*row.prompt_ids, *row.response_ids]) for name, row in told]
        result.seen.append(sorted([name, ids, count] for (name, ids), count in zip(seen, counts, strict=True)))
    return result


def run_trl(case: Case, folder: Path, channel: Any) -> Result:
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental import cpo

    result = Result(
        {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        _status_mib("VmRSS"),
    )
    turns = Turns(case, folder, result, channel)

    class InTurns(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            turns()

    place = cpo if case.trainer == "CPO" else trl
    settings = getattr(place, f"{case.trainer}Config")(**_trl_arguments(case, folder))

    auto = AutoModelForSequenceClassification if case.trainer == "Reward" else AutoModelForCausalLM

    def model(name: str) -> Any:
        return auto.from_pretrained(folder / name, dtype=torch.float32)

    trainer = getattr(place, f"{case.trainer}Trainer")(
        model=model(case.start),
        args=settings,
        train_dataset=Dataset.from_list(_in_order(case, folder)),
        processing_class=AutoTokenizer.from_pretrained(folder / case.start),
        callbacks=[InTurns()],
        **({"ref_model": model(case.frozen["reference"])} if case.frozen else {}),
    )
    collate = trainer.data_collator
    micro_batches: list[list[list[Any]]] = []

    def recorded(examples: list[Any]) -> Any:
        batch = collate(examples)
        micro_batches.append(_batch_seen(batch))
        return batch

    trainer.data_collator = recorded
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    result.losses = [line["loss"] for line in logs]
    result.grad_norms = [float(line["grad_norm"]) for line in logs]
    result.reference_points = [line["kl"] for line in logs if "kl" in line]
    each = case.batch_size // case.micro_batch_size
    steps = [micro_batches[k * each : (k + 1) * each] for k in range(case.steps)]
    result.seen = [sorted(row for batch in step for row in batch) for step in steps]
    return result


def run_plain(case: Case, folder: Path, channel: Any) -> Result:
    import torch
    import transformers
    from parity_plain import PlainAlignDistil

    result = Result({"torch": torch.__version__, "transformers": transformers.__version__}, _status_mib("VmRSS"))
    turns = Turns(case, folder, result, channel)
    training = PlainAlignDistil(case, folder)
    for step in case.order:
        texts = training.texts(step)
        result.losses.append(training.gradient(texts))
        turns()
        result.grad_norms.append(training.step())
        result.seen.append(sorted(["chosen", text.ids, len(text.ids) - text.prompt] for text in texts))
    return result


def _trl_arguments(case: Case, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": case.steps,
        "per_device_train_batch_size": case.micro_batch_size,
        "gradient_accumulation_steps": case.batch_size // case.micro_batch_size,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "max_length": NO_LIMIT,
        "seed": SEED,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        **case.options,
    }


def _in_order(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The rows as TRL shall read them, one step after the other.

    Its KTO gives each prompt the response of the row before it, ours that of the row after: the same mismatched rows
    come about when every step is read from its end.
    """
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    backwards = case.kind == "unpaired"
    return [rows[i] for step in case.order for i in (reversed(step) if backwards else step)]


def _batch_seen(batch: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of a collated batch, without their padding."""
    if "chosen_input_ids" in batch:
        return [row for name in ("chosen", "rejected") for row in _rows(batch, f"{name}_", [name])]
    if "label" in batch:
        names = ["desirable" if label else "undesirable" for label in batch["label"].tolist()]
        return _rows(batch, "", names) + _rows(batch, "KL_", ["mismatched"])
    half = len(batch["input_ids"]) // 2
    if "completion_mask" not in batch and "labels" not in batch:  # the reward model's
        batch = {**batch, "completion_mask": 0 * batch["attention_mask"]}
    return _rows(batch, "", ["chosen"] * half + ["rejected"] * half)


def _rows(batch: Mapping[str, Any], prefix: str, names: Sequence[str]) -> list[list[Any]]:
    ids, attended = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool()
    given = f"{prefix}completion_mask"
    response = attended & (batch[given].bool() if given in batch else batch[f"{prefix}labels"] != -100)
    return [
        [name, row[where].tolist(), int(count)]
        for name, row, where, count in zip(cycle(names), ids, attended, response.sum(-1), strict=False)
    ]


SIDES = {"ours": run_ours, "trl": run_trl, "plain": run_plain}


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    # What libraries print must not be taken for a word of ours.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = Case(**json.loads((folder / "case.json").read_text()))
    (folder / f"{side}.json").write_text(json.dumps(asdict(SIDES[side](case, folder, channel))))


if __name__ == "__main__":
    main()
