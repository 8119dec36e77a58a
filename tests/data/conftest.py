"""Tokenizers as models have them, trained here in a second: Qwen-like, Llama-like, Gemma-like, and plain GPT-2-like."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The film was good and the music was better.",
    "I did not like the story, but the actors were great!",
    "Write a short review of a film.\nBe kind.",
    "What is 2 + 2? It is 4. Yes, no, maybe.",
    "user system assistant model Human Assistant answer question prompt",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def build(
    specials: list[str],
    *,
    adds_bos: bool = False,
    metaspace: bool = False,
    corpus: Iterable[str] = CORPUS,
    **names: Any,
) -> PreTrainedTokenizerBase:
    """A BPE tokenizer; the first of `specials` is the BOS when `adds_bos`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = ["\n", *map(chr, range(33, 127))]
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=specials, **names)


@pytest.fixture(scope="session")
def qwen() -> PreTrainedTokenizerBase:
    """No BOS; the end of a turn is <|im_end|> and a line break follows it."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return build(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def llama() -> PreTrainedTokenizerBase:
    """Both the tokenizer and the template write a BOS; the pad token is the EOS."""
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return build(
        specials,
        adds_bos=True,
        bos_token=specials[0],
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        chat_template=LLAMA,
    )


@pytest.fixture(scope="session")
def gemma() -> PreTrainedTokenizerBase:
    """The template trims and knows no system role; <end_of_turn> ends a turn, <eos> is the tokenizer's EOS."""
    specials = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return build(
        specials,
        adds_bos=True,
        metaspace=True,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=GEMMA,
    )


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerBase:
    """No template, one special token, which is EOS and padding."""
    return build(["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what another, or another run, has cached."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    return home


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    """Writes rows to a .jsonl file (or .jsonl.gz) and returns its path."""

    def to_file(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return str(path)

    return to_file
