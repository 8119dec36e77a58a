"""What both sides of parity_trl.py read: the models, the rows, their settings and our recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from parity_sides import NO_LIMIT, SEED, Case
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from aligndistil.batch import DataKind
from aligndistil.data import load_examples
from aligndistil.models import stop_ids
from aligndistil.recipe import Data, Model

VOCAB = 49_152
NOISE = 0.2
"""Of the two teachers, as a share of the deviation of each matrix."""


def save_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """The model both sides start from, and the tokenizer without its chat template: the rows are rendered already."""
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        torch.manual_seed(SEED)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            **ids,
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not arguments.model:
        add_words(folder / "tokenizer.json")
    return sum(parameter.numel() for parameter in model.parameters())


def add_words(file: Path) -> None:
    """Words that no text is cut into, up to the size of the model's vocabulary.

    Ours cuts the vocabulary where the ids of the tokenizer end, and TRL does not.
    """
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    taken = {*words.values(), *(token["id"] for token in content["added_tokens"])}
    words |= {f"<{number}>": number for number in range(VOCAB) if number not in taken}
    file.write_text(json.dumps(content))


def save_others(folder: Path) -> None:
    """Beside the model: one with a scalar head, and two that are a little noise away from it, to be teachers.

    A score is read at the last token that is no padding, so padding must end no text.
    """
    torch.manual_seed(SEED)
    tokenizer, with_pad = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    if with_pad.pad_token == with_pad.eos_token:
        with_pad.pad_token = with_pad.unk_token
    scalar = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, pad_token_id=with_pad.pad_token_id
    )
    scalar.save_pretrained(folder.with_name("scalar"))
    with_pad.save_pretrained(folder.with_name("scalar"))
    for name in ("teacher", "reverse"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.add_(torch.randn_like(weight), alpha=NOISE * float(weight.std()))
        model.save_pretrained(folder.with_name(name))
        tokenizer.save_pretrained(folder.with_name(name))


def usable_pairs(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, str]]:
    """Rendered pairs that every tokenization of prompt, or prompt and response, cuts into the same tokens.

    Nothing is truncated, and no prompt comes twice.
    """
    path = arguments.tokenizer
    section = Data(
        train=[{"path": arguments.data}],
        max_prompt_length=arguments.max_length,
        max_response_length=arguments.max_length,
        max_dropped_fraction=1.0,
        on_boundary_mismatch="drop",
    )
    stops = stop_ids(path, Model(path=path), tokenizer)
    examples = load_examples(section, "train", DataKind.PAIRS, tokenizer, stops)
    seen = set[str]()
    for i in range(len(examples)):
        rows = examples.rows(i)
        wholes = [[*row.prompt_ids, *row.response_ids] for row in rows]
        ends = all(whole[-1] == tokenizer.eos_token_id for whole in wholes)
        if not ends or max(map(len, wholes)) >= arguments.max_length:
            continue
        prompt, *texts = (tokenizer.decode(ids) for ids in (rows[0].prompt_ids, *wholes))
        again = [tokenizer(text)["input_ids"] for text in (prompt, *texts)]
        if again == [list(rows[0].prompt_ids), *wholes] and prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "chosen": texts[0][len(prompt) :], "rejected": texts[1][len(prompt) :]}


def write_case(case: Case, rows: list[dict[str, Any]], base: Path, folder: Path) -> None:
    """Everything the two sides read; the models are in `base`."""
    folder.mkdir(parents=True)
    for name in {case.start, *case.frozen.values()}:
        (folder / name).symlink_to((base / name).resolve())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    stage: dict[str, Any] = {"objective": case.objective}
    if case.frozen:
        stage["models"] = {role: str(folder / name) for role, name in case.frozen.items()}
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / case.start), "dtype": "float32"},
        "data": {
            "train": {
                "path": str(folder / "rows.jsonl"),
                "format": "unpaired" if case.kind == "unpaired" else "preference",
            },
            "max_prompt_length": NO_LIMIT,
            "max_response_length": NO_LIMIT,
        },
        "train": {
            "learning_rate": case.learning_rate,
            "lr_scheduler": "cosine",
            # The two warm up differently (transformers' first step has a rate of 0), so neither does.
            "warmup_ratio": 0.0,
            "max_steps": case.steps,
            "batch_size": case.batch_size,
            "micro_batch_size": case.micro_batch_size,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "adam_betas": [0.9, 0.95],
            "seed": SEED,
        },
        "engine": {"zero_stage": 0},
        "stages": {"parity": stage},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))


def rows_of(case: Case, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """For unpaired data, one response of each pair: chosen and rejected in turn."""
    pairs = pairs[: case.rows]
    if case.kind != "unpaired":
        return list(pairs)
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, pair in enumerate(pairs)
    ]
