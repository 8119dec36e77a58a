"""Tiny models and tokenizers, and sentences for them; the fixtures that save them are in conftest.py.

Imports are late, so that conftest.py can set the environment that libraries read when they are imported.
"""

import random
from typing import Any

PAD, EOS = 0, 1
SPECIALS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]
WORDS = [f"w{number:02d}" for number in range(91)]
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <bot>"
    "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
)


def build_tokenizer(words: list[str] = WORDS) -> Any:
    """A word is a token; token 1 ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIALS[3:], **names)


def build_model(*, seed: int = 0, tied: bool = True, vocab: int = 96, scalar: bool = False, **config: Any) -> Any:
    """A Llama of 2 layers x 32 whose distributions, or whose scores with a scalar head, are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    config = {"num_labels": 1, **config} if scalar else config
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    settings = {"max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": tied}
    return kind(LlamaConfig(vocab_size=vocab, **{**sizes, **ends, **settings, **config})).eval()


def nonsense(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(shortest, longest)))
