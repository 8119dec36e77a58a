"""The memory that `train --dry-run` estimates, beside what a stage then takes on this CPU.

    python benchmarks/memory_estimate.py [--model FOLDER] [--only TEXT] [--write]

Each case trains two steps of a stage, with rows as long as its recipe allows, in a process of its own. Measured is the
highest resident memory above what the process held before the stage began, Python and its libraries. `small` is a Llama
of 28 M random weights; FOLDER is SmolLM2-135M-Instruct (`make smollm2`), whose tokenizer both have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- memory_estimate:begin -->", "<!-- memory_estimate:end -->"
SHAPE = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 3}
PROMPT, RESPONSE = 64, 192


class Case(NamedTuple):
    model: str
    objective: str
    micro: int
    zero: int = 0
    checkpointing: bool = False
    rollout: bool = False
    dtype: str = "float32"
    response: int = RESPONSE

    @property
    def name(self) -> str:
        marks = {"checkpointing": self.checkpointing, "on-policy": self.rollout, "bfloat16": self.dtype == "bfloat16"}
        marks[f"{self.response} tokens"] = self.response != RESPONSE
        return ", ".join([self.objective, *(mark for mark, there in marks.items() if there)])


CASES = [
    Case("small", "sft", 4),
    Case("small", "sft", 16, checkpointing=True),
    Case("small", "sft", 1, response=960),
    Case("small", "sft", 4, zero=2),
    Case("small", "dpo", 1),
    Case("small", "dpo", 4),
    Case("small", "dpo", 4, zero=2),
    Case("small", "dpo", 4, zero=3),
    Case("small", "dpo", 4, zero=2, dtype="bfloat16"),
    Case("small", "aligndistil", 1),
    Case("small", "aligndistil", 8),
    Case("small", "aligndistil", 4, zero=2, checkpointing=True),
    Case("small", "aligndistil", 4, rollout=True),
    Case("small", "reward_model", 4),
    Case("small", "ppo", 2, rollout=True),
    Case("smollm2", "sft", 2),
    Case("smollm2", "dpo", 1, zero=2),
    Case("smollm2", "aligndistil", 1),
]
ROLES = {
    "dpo": ("reference",),
    "aligndistil": ("teacher", "reverse_teacher"),
    "ppo": ("reference", "reward", "critic"),
}


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    model, reward = str(folder / case.model), str(folder / f"{case.model}-reward")
    kind = {"sft": "demonstrations", "dpo": "pairs", "reward_model": "pairs"}.get(case.objective, "demonstrations")
    kind = "prompts" if case.rollout else kind
    stage: dict[str, Any] = {
        "name": "case",
        "output_dir": str(folder / "run"),
        "model": {"path": model, "dtype": case.dtype, "gradient_checkpointing": case.checkpointing},
        "objective": {"name": case.objective},
        "models": {role: reward if role in ("reward", "critic") else model for role in ROLES.get(case.objective, ())},
        "data": {
            "train": {"path": str(folder / f"{kind}.jsonl")},
            "max_prompt_length": PROMPT,
            "max_response_length": case.response,
        },
        "train": {"batch_size": 2 * case.micro, "micro_batch_size": case.micro, "max_steps": 2, "warmup_ratio": 0.0},
        "engine": {"zero_stage": case.zero},
        "checkpoint": {"every": None},
        "logging": {"every": 1},
    }
    if case.rollout:
        stage["rollout"] = {"max_new_tokens": case.response}
    return stage


def prepare(folder: Path, smollm2: Path) -> None:
    """Models and data of all cases."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    shape = LlamaConfig(
        **SHAPE,
        intermediate_size=1024,
        vocab_size=49_152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    models = {
        "small": AutoModelForCausalLM.from_config(shape),
        "small-reward": AutoModelForSequenceClassification.from_config(LlamaConfig(**shape.to_dict(), num_labels=1)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "smollm2").symlink_to(smollm2.resolve())
    prompt = [{"role": "user", "content": "Say something about the sea. " * 40}]
    long = [[{"role": "assistant", "content": f"The sea is {word} and wide. " * 400}] for word in ("blue", "grey")]
    rows = {
        "pairs": {"prompt": prompt, "chosen": long[0], "rejected": long[1]},
        "demonstrations": {"messages": [*prompt, *long[0]]},
        "prompts": {"prompt": prompt},
    }
    for kind, row in rows.items():
        (folder / f"{kind}.jsonl").write_text((json.dumps(row) + "\n") * 64)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """GiB that were estimated, by part, and measured."""
    from aligndistil.engine.config import import_deepspeed
    from aligndistil.engine.memory import forget_peak_memory
    from aligndistil.engine.processes import process_group
    from aligndistil.recipe import load_recipe
    from aligndistil.run_folder import RunFolder
    from aligndistil.stop import StopSignal
    from aligndistil.training import StageTraining
    from aligndistil.training.memory import memory, models_of

    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(recipe(case, folder)))
    (stage,) = load_recipe(path).stages.values()
    import_deepspeed()
    models = models_of(stage, str, lambda path: (path, 0))
    needed = memory(stage, models, 1, device="cpu")
    run = RunFolder(folder / "run").stage(stage.name)
    run.path.mkdir(parents=True, exist_ok=True)
    with process_group() as processes:
        training = StageTraining(stage, run, str, processes)
        held = forget_peak_memory()
        training.run(StopSignal())
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line.get("step") == 2 and "perf/peak_memory_gib" in line]
    parts = {name: getattr(needed, name) for name in needed.__slots__}
    return {"estimated": needed.total, "measured": last["perf/peak_memory_gib"] - held, "parts": parts}


def in_its_own_process(case: Case, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case), "--folder", str(folder)]
    # Every large tensor is a mapping of its own, which goes back to the system at once: what torch counts on a card.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


HEADERS = ("model", "stage", "micro-batch", "ZeRO", "estimated GiB", "measured GiB", "off")


def row_of(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    estimated, measured = result["estimated"], result["measured"]
    off = f"{estimated / measured - 1:+.0%}".replace("%", " %")
    return case.model, case.name, str(case.micro), str(case.zero), f"{estimated:.2f}", f"{measured:.2f}", off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="SmolLM2's folder")
    parser.add_argument("--only", default="", help="cases whose row holds this text")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(run_case(Case(*json.loads(chosen.case)), chosen.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), chosen.model)
        for case in CASES:
            if chosen.only not in f"{case.model} {case.name} {case.micro} {case.zero}":
                continue
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                for one in Path(scratch).iterdir():
                    if one != Path(own):
                        (Path(own) / one.name).symlink_to(one)
                result = in_its_own_process(case, Path(own))
            rows.append(row_of(case, result))
            parts = {name: round(value, 3) for name, value in result["parts"].items() if value > 0.0005}
            print("  ".join(rows[-1]), parts, file=sys.stderr, flush=True)
    table = Table(*HEADERS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if chosen.write:
        text = ["| " + " | ".join(HEADERS) + " |", "|---|---|---:|---:|---:|---:|---:|"]
        text += ["| " + " | ".join(row) + " |" for row in rows]
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n" + "\n".join(text) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
