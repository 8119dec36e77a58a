"""Build `builtin:tiny` and `builtin:reviews` from nothing; other versions of torch or transformers give other weights.

    python scripts/build_assets.py [--work FOLDER] [--out aligndistil/assets]

Corpus of the review grammar -> tokenizer -> random model -> SFT with this package's own engine and `sft` objective ->
pairs of the trained model's own samples, labelled by the gold reward with Bradley-Terry noise.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import Template

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums over threads would depend on how many there are

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from aligndistil.commands.train import run_recipe
from aligndistil.data.reviews import generate, gold_reward
from aligndistil.engine import trained
from aligndistil.recipe import Train, load_recipe

DEMONSTRATIONS = 38_400
CORPUS_SEED, PROMPT_SEED, SAMPLE_SEED, LABEL_SEED = 0, 1, 2, 3
TRAIN_PAIRS, TEST_PAIRS = 1_500, 256
VOCABULARY = 1_536
MAX_LENGTH = 256
MAX_NEW_TOKENS = 96
LABEL_SHARPNESS = 4.0
"""Bradley-Terry: a label is right with probability sigmoid(LABEL_SHARPNESS x difference of the gold rewards)."""

PAD, END = "<pad>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

RECIPE = Template("""\
name: build-assets
model: {path: $model, dtype: float32}
objective: {name: sft}
data:
  train: {path: $demonstrations, format: demonstrations}
  max_prompt_length: 96
  max_response_length: 128
train:
  learning_rate: 3.0e-3
  lr_scheduler: cosine
  warmup_ratio: 0.05
  epochs: 1
  batch_size: 64
  micro_batch_size: 64
  seed: 0
engine: {zero_stage: 0}
output_dir: $output
""")


def build_tokenizer(corpus: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so any text survives encoding and decoding, not just reviews."""
    tokenizer = Tokenizer(models.BPE())
    # A word takes the space before it along; punctuation and each digit stand alone, so that years are read off easily.
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d|\s+(?!\S)|[^A-Za-z\d\s]|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in corpus for text in (row["prompt"], row["response"])), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def initial_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 1 M random parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def warm_up_from_zero(optimizer: torch.optim.Optimizer, section: Train, steps: int) -> LambdaLR:
    """transformers' cosine schedule, whose first step has a rate of 0, as the engine's had when the assets were made.

    Another schedule would be another model and other pairs, and every figure in docs/results another.
    """
    return get_cosine_schedule_with_warmup(optimizer, math.ceil(section.warmup_ratio * steps), steps)


def train(work: Path, corpus: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Path:
    """SFT through the package's own pipeline; the folder of the trained model."""
    tokenizer.save_pretrained(work / "initial")
    initial_model(tokenizer).save_pretrained(work / "initial")
    demonstrations = work / "demonstrations.jsonl"
    rows = ({"prompt": row["prompt"], "completion": row["response"]} for row in corpus)
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = work / "recipe.yaml"
    paths = {"model": work / "initial", "demonstrations": demonstrations, "output": work / "run"}
    recipe.write_text(RECIPE.substitute({key: json.dumps(str(path)) for key, path in paths.items()}), encoding="utf-8")
    trained.schedule = warm_up_from_zero
    return run_recipe(load_recipe(recipe)).final


def held_out_prompts(corpus: list[dict[str, str]], count: int) -> list[str]:
    """`count` different prompts that the corpus does not have."""
    seen = {row["prompt"] for row in corpus}
    fresh = dict.fromkeys(row["prompt"] for row in generate(PROMPT_SEED, 4 * count) if row["prompt"] not in seen)
    return list(fresh)[:count]


def answers(folder: Path, prompts: list[str], batch_size: int = 128) -> Iterator[tuple[str, str, str]]:
    """Each prompt with two samples of the model at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(SAMPLE_SEED)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in batch
        ]
        inputs = tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
        ids = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=2, max_new_tokens=MAX_NEW_TOKENS,
        )  # fmt: skip
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(batch, texts[0::2], texts[1::2], strict=True)


def label(triples: Iterator[tuple[str, str, str]], count: int) -> list[dict[str, str]]:
    """The first `count` pairs of two different answers, the better one chosen with Bradley-Terry probability."""
    rng = Random(LABEL_SEED)
    pairs: list[dict[str, str]] = []
    for prompt, first, second in triples:
        if first == second or not first or not second:
            continue
        difference = gold_reward(first) - gold_reward(second)
        first_wins = rng.random() < 1 / (1 + math.exp(-LABEL_SHARPNESS * difference))
        chosen, rejected = (first, second) if first_wins else (second, first)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if len(pairs) == count:
            break
    return pairs


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> None:
    """Gzip without a time stamp or name, so that the same pairs are the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write(lines)


def agreement(pairs: list[dict[str, str]]) -> str:
    """How many labels agree with the gold reward, among the pairs where it prefers one."""
    differences = [gold_reward(pair["chosen"]) - gold_reward(pair["rejected"]) for pair in pairs]
    decided = [difference for difference in differences if difference]
    right = sum(difference > 0 for difference in decided)
    return f"{len(pairs)} pairs, {right / len(decided):.1%} of the {len(decided)} with a gold difference labelled right"


def write_model(source: Path, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """The trained model as a plain folder: no card, no training state, nothing that names this machine."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # weights are written readable to their owner alone


def write_assets(model: Path, tokenizer: PreTrainedTokenizerFast, corpus: list[dict[str, str]], out: Path) -> None:
    """Everything that is shipped, from a trained model folder."""
    write_model(model, tokenizer, out / "tiny")
    wanted = TRAIN_PAIRS + TEST_PAIRS
    pairs = label(answers(out / "tiny", held_out_prompts(corpus, wanted + wanted // 10)), wanted)
    splits = {"train": pairs[:TRAIN_PAIRS], "test": pairs[TRAIN_PAIRS:]}
    for split, rows in splits.items():
        write_pairs(out / "reviews" / f"{split}.jsonl.gz", rows)
        print(f"{split}: {agreement(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the intermediate files (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "aligndistil" / "assets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = generate(CORPUS_SEED, DEMONSTRATIONS)
    tokenizer = build_tokenizer(corpus)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_assets(train(work, corpus, tokenizer), tokenizer, corpus, options.out)


if __name__ == "__main__":
    main()
