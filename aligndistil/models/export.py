"""Save a trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from aligndistil.files import replace_folder, start_folder


def export_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    folder: Path,
    card: str,
) -> None:
    """Write weights, configuration, tokenizer, generation configuration and card, all of them or none.

    The generation configuration stops at every id that training treated as an end, and samples as it did before.
    A model with a scalar head has none.
    """
    partial = start_folder(folder)
    cached, model.config.use_cache = model.config.use_cache, True
    if model.can_generate():
        _save_generating(model, state, tokenizer, stops, partial)
    else:
        # transformers finds the token to score by looking for padding: an EOS that pads would not be scored.
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
        model.save_pretrained(partial, state_dict=state)
    model.config.use_cache = cached
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    replace_folder(folder)


def _save_generating(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    folder: Path,
) -> None:
    generation = model.generation_config
    ids = sorted(stops)
    generation.eos_token_id = ids if len(ids) > 1 else ids[0]
    generation.pad_token_id = tokenizer.pad_token_id
    # transformers refuses to save some settings that models are published with (a temperature without sampling): these
    # are written as they came, so that a finished training does not fail on them.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, state_dict=state)
    model.generation_config = generation
    (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
