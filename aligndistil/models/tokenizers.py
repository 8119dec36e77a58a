"""Tokenizers: loading, the ids that end a response, and whether two models speak about the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from aligndistil import recipe
from aligndistil.errors import UserError
from aligndistil.models.places import base_of, configured, from_hub, located, model_exists


def load_tokenizer(path: str, section: recipe.Model) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, with the recipe's chat template where it gives one.

    A tokenizer without a padding token pads with its end-of-sequence token: masks come from lengths, so the id is never
    looked at, and no embedding is added.
    """
    tokenizer = published_tokenizer(path, section)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path!r} has no end-of-sequence token; set eos_token in its configuration")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def published_tokenizer(path: str, section: recipe.Model) -> PreTrainedTokenizerBase:
    """The tokenizer as it came, but for the recipe's chat template: what is exported."""
    if base_of(path) is not None:
        model_exists(path)
    place, options = located(tokenized(path))
    options["trust_remote_code"] = section.trust_remote_code
    tokenizer = from_hub(path, lambda: AutoTokenizer.from_pretrained(place, **options))
    if section.chat_template:
        file = Path(section.chat_template)
        is_file = len(section.chat_template) < 4096 and "{" not in section.chat_template
        if is_file and not file.is_file():
            raise UserError(f"model.chat_template: {section.chat_template!r} is no file and no Jinja template")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else section.chat_template
        except UnicodeDecodeError as error:
            raise UserError(
                f"model.chat_template: {file}: byte {error.start} is not UTF-8; save the file as UTF-8"
            ) from None
    return tokenizer


def tokenized(path: str) -> str:
    """Where the tokenizer of a model lies: an adapter may come without one, and then has its base's."""
    base = base_of(path)
    return path if base is None or (Path(path) / "tokenizer_config.json").is_file() else tokenized(base)


def stop_ids(path: str, section: recipe.Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: the tokenizer's, the configuration's and the generation configuration's.

    Raises UserError when one of these is damaged.
    """
    place, revision = located(configured(path))
    found = {tokenizer.eos_token_id}
    options = revision | {"trust_remote_code": section.trust_remote_code}
    config = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options))
    values = [getattr(config, "eos_token_id", None)]

    def of_generation() -> object:
        try:
            return GenerationConfig.from_pretrained(place, **revision).eos_token_id
        except OSError:  # a model need not have one
            if (Path(place) / GENERATION_CONFIG_NAME).exists():
                raise
            return None

    values.append(from_hub(path, of_generation))
    for value in values:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if wrong := [value for value in found if not isinstance(value, int)]:
        raise UserError(
            f"model {path!r} names {wrong[0]!r} as its eos_token_id, which is no number; mend its configuration"
        )
    return frozenset(found)


def check_same_tokenizer(
    path: str, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, extra_allowed: bool = False
) -> None:
    """Refuse a model whose tokens mean something else than the policy's.

    `extra_allowed`: the model only reads, so that tokens which the policy does not have do no harm (Qwen2.5 has some
    that Qwen2 has not). Raises UserError naming the first token that differs.
    """
    if differing := _differing(ours, theirs, extra_allowed=extra_allowed):
        a, b, example = ours.get_vocab(), theirs.get_vocab(), differing[0]
        raise UserError(
            f"model {path!r} has another tokenizer than the policy: {len(differing)} tokens differ, {example!r} for "
            f"one ({a.get(example)} and {b.get(example)}); token-level objectives need models of one family"
        )


def reads_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Whether a model can be given the policy's tokens; see `check_same_tokenizer`."""
    return not _differing(ours, theirs, extra_allowed=True)


def _differing(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *, extra_allowed: bool) -> list[str]:
    """Tokens that mean something else, and then those that one of the two has not."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    different = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
    return different + sorted(a.keys() - b.keys() if extra_allowed else a.keys() ^ b.keys())


def shared_vocab(models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the vocabulary that are tokens: what some models pad their matrices with is cut from every softmax.

    Nothing was ever trained there, no data hold such ids, and a sampled one could be neither decoded nor read by a
    model with fewer rows. Raises UserError when a model has fewer rows than the tokenizer has tokens.
    """
    rows: dict[str, int] = {}
    for model in models:
        matrix: Any = model.get_output_embeddings() or model.get_input_embeddings()  # a scalar head has none of words
        rows[str(model.config.name_or_path)] = matrix.weight.shape[0]
    smallest = min(rows.values())
    if smallest < len(tokenizer):
        name = min(rows, key=lambda key: rows[key])
        raise UserError(f"model {name!r} has {smallest} rows for {len(tokenizer)} tokens; resize its embeddings")
    return min(smallest, 1 + max(tokenizer.get_vocab().values()))  # ids may have gaps
