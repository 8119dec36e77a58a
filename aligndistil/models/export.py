"""Save a trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def export_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    folder: Path,
    card: str,
) -> None:
    """Write weights, configuration, tokenizer, generation configuration and card; aside first, then renamed.

    The generation configuration stops at every id that training treated as an end, and samples as it did before.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    if aside.exists():
        shutil.rmtree(aside)
    generation = model.generation_config
    ids = sorted(stops)
    generation.eos_token_id = ids if len(ids) > 1 else ids[0]
    generation.pad_token_id = tokenizer.pad_token_id
    cached, model.config.use_cache = model.config.use_cache, True
    # transformers refuses to save some settings that models are published with (a temperature without sampling): these
    # are written as they came, so that a finished training does not fail on them.
    model.generation_config = GenerationConfig()
    model.save_pretrained(aside, state_dict=state)
    model.config.use_cache, model.generation_config = cached, generation
    (aside / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
