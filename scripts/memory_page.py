"""Write docs/memory.md: what training models of 7 and 8 billion parameters takes, as `train --dry-run` estimates it.

    python scripts/memory_page.py [--check]

The models are folders with a configuration and no weights. Each row is a plan of a recipe for cards of 80 GiB.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from aligndistil.commands.cards import USABLE, Card
from aligndistil.commands.data_checks import ReadStage, read_stages
from aligndistil.commands.plan import planned
from aligndistil.commands.plan_tables import PARTS, Planned, gib
from aligndistil.errors import ServiceError
from aligndistil.models import load_tokenizer
from aligndistil.recipe import Model, load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
CARD = Card("cuda", 80.0, None)
MODELS: dict[str, PretrainedConfig] = {
    "Llama 3.1 8B": LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    ),
    "Qwen2.5 7B": Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18_944,
        vocab_size=152_064,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    ),
}
RECIPE = """
model: {{path: {folder}}}
data: {{train: {{path: builtin:reviews, limit: 64}}, max_prompt_length: 1024, max_response_length: 1024}}
train: {{batch_size: 64, micro_batch_size: 1}}
engine: {{zero_stage: 2}}
stages:
  dpo: {{objective: {{name: dpo}}, models: {{reference: {folder}}}}}
  reverse_dpo: {{objective: {{name: dpo}}, models: {{reference: {folder}}}, data: {{reverse_preferences: true}}}}
  aligndistil:
    objective: {{name: aligndistil}}
    models: {{teacher: "stage:dpo", reverse_teacher: "stage:reverse_dpo"}}
  on_policy:
    objective: {{name: aligndistil}}
    models: {{teacher: "stage:dpo", reverse_teacher: "stage:reverse_dpo"}}
    rollout: {{max_new_tokens: 1024, batch_size: 16}}
"""
AGAIN, SHARDED = "model.gradient_checkpointing=true", "engine.zero_stage=3"
VARIANTS: list[tuple[str, int, list[str]]] = [
    ("all weights", 1, []),
    ("checkpointing", 1, [AGAIN]),
    ("checkpointing, cached teachers", 1, [AGAIN, "engine.teacher_cache=true"]),
    ("checkpointing, `offload: optimizer`", 1, [AGAIN, "engine.offload=optimizer"]),
    ("checkpointing, ZeRO-3", 8, [AGAIN, SHARDED]),
    ("checkpointing, ZeRO-3, `offload: optimizer`", 8, [AGAIN, SHARDED, "engine.offload=optimizer"]),
    ("checkpointing, ZeRO-3, `offload: parameters`", 8, [AGAIN, SHARDED, "engine.offload=parameters"]),
    ("adapters, `lora: {r: 16}`", 1, ["model.lora={r: 16}"]),
    ("adapters, checkpointing", 1, ["model.lora={r: 16}", AGAIN]),
]
STAGES = {"dpo": "DPO", "aligndistil": "AlignDistil, off-policy", "on_policy": "AlignDistil, on-policy"}
HEAD = f"""# Memory: 8B on 80 GB

What `aligndistil train RECIPE --dry-run --gpu-memory 80` says of models of 7 and 8 billion
parameters: GiB of a process with one GPU, in bfloat16, for rows of 1,024 prompt and 1,024 response
tokens, with `micro_batch_size: 1` and ZeRO-2 where nothing else is written. A rollout generates 16
responses at once. A stage fits that takes at most {USABLE:.0%} of the card; the rest is the CUDA
context, the kernels' workspaces and fragmentation. These are estimates from the models'
configurations: no figure of this page was measured on a card.

The estimate is compared with the peak at the first step of every stage, in the stage's log, and
both are in `metrics.jsonl` (`perf/estimated_memory_gib`, `perf/peak_memory_gib`).
[benchmarks/README.md](../benchmarks/README.md#the-memory-that-the-dry-run-estimates) compares them
on a CPU.

*Checkpointing* is `model.gradient_checkpointing`, *cached teachers* `engine.teacher_cache`.

* **weights**: of the policy, and what ZeRO-3 has gathered of it. With adapters, the base once,
  which the policy and every frozen model on the same base share.
* **gradients, optimizer**: gradients in float32, a float32 copy of the weights and AdamW's two
  moments, and DeepSpeed's buffer for gradients on their way.
  Offloaded, they take 16 bytes of the CPU's memory for each parameter, over all processes.
* **frozen models**: reference or teachers.
* **activations**, **head**: what the backward pass keeps, and the logits of one chunk of tokens
  with the gradient of the head.
* **rollout**, **update**: keys and values of sampling, and what the optimizer needs for its step.
  They are there at other times than activations and head, so that the largest counts.

This page is written by `scripts/memory_page.py`.
"""


def page() -> str:
    """The whole text."""
    text = HEAD
    for model, config in MODELS.items():
        with _recipe(config) as path:
            recipe = load_recipe(path)
            read = read_stages(recipe, list(recipe.stages))
            plans = [(label, processes, _plan(path, read, processes, sets)) for label, processes, sets in VARIANTS]
        text += f"\n## {model}\n"
        for stage, title in STAGES.items():
            rows = [(label, processes, plan[stage]) for label, processes, plan in plans if stage in plan]
            text += f"\n### {title}\n\n" + "".join(_table(rows))
    return text


@contextmanager
def _recipe(config: PretrainedConfig) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        config.save_pretrained(folder)
        load_tokenizer("builtin:tiny", Model(path="builtin:tiny")).save_pretrained(folder)
        path = Path(scratch) / "recipe.yaml"
        path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
        yield path


def _plan(
    path: Path, read: Mapping[str, ReadStage | ServiceError], processes: int, sets: list[str]
) -> dict[str, Planned]:
    """By stage; without that on-policy where teachers are cached."""
    names = [name for name in read if name != "on_policy" or not any("teacher_cache" in one for one in sets)]
    recipe = load_recipe(path, [f"stages.{name}.{one}" for name in names for one in sets])
    return {one.name: one for one in planned(recipe, {name: read[name] for name in names}, processes, CARD, set())}


def _table(rows: list[tuple[str, int, Planned]]) -> Iterator[str]:
    needed = [stage.memory for *_, stage in rows if stage.memory is not None]
    parts = {head.replace("-\n", "").replace("\n", " "): part for head, part in PARTS.items() if any(map(part, needed))}
    yield f"| how | GPUs | {' | '.join(parts)} | fits 80 |\n"
    yield f"|---|{'---:|' * (len(parts) + 2)}\n"
    for (label, processes, stage), memory in zip(rows, needed, strict=True):
        cells = [gib(value) if (value := part(memory)) >= 0.005 else "" for part in parts.values()]
        cells[-1] = f"**{cells[-1]}**"
        yield f"| {label} | {processes} | {' | '.join(cells)} | {stage.fits} |\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else f"{PAGE} is out of date: run {__file__}")
    PAGE.write_text(page(), encoding="utf-8")
