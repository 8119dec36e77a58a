"""Models and tokenizers: where a role's folder is, loading it, and checking that models fit each other."""

from aligndistil.models.adapters import adapter_at, layers_of
from aligndistil.models.bases import Bases
from aligndistil.models.export import export_adapter, export_model
from aligndistil.models.load import (
    Positions,
    check_language_model,
    check_lora,
    check_scalar_model,
    check_weights,
    config_of,
    load_model,
    load_scalar_model,
    pick_dtype,
    positions,
    text_part,
)
from aligndistil.models.places import (
    base_of,
    builtin_model,
    configured,
    from_hub,
    located,
    model_exists,
    model_hash,
    whole_base_of,
)
from aligndistil.models.sizes import KNOWN_MODELS, ModelSize, configuration, model_size
from aligndistil.models.tokenizers import check_same_tokenizer, load_tokenizer, reads_tokens, shared_vocab, stop_ids

__all__ = [
    "KNOWN_MODELS",
    "Bases",
    "ModelSize",
    "Positions",
    "adapter_at",
    "base_of",
    "builtin_model",
    "check_language_model",
    "check_lora",
    "check_same_tokenizer",
    "check_scalar_model",
    "check_weights",
    "config_of",
    "configuration",
    "configured",
    "export_adapter",
    "export_model",
    "from_hub",
    "layers_of",
    "load_model",
    "load_scalar_model",
    "load_tokenizer",
    "located",
    "model_exists",
    "model_hash",
    "model_size",
    "pick_dtype",
    "positions",
    "reads_tokens",
    "shared_vocab",
    "stop_ids",
    "text_part",
    "whole_base_of",
]
