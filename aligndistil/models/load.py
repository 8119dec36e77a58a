"""Load a causal language model from a folder, the Hub or the package itself, without dropout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from aligndistil import recipe
from aligndistil.errors import UserError
from aligndistil.models.places import from_hub, located, model_exists

_DROPS = ("dropout", "pdrop", "dropout_prob", "layerdrop")
transformers.utils.logging.disable_progress_bar()  # it draws over ours


def pick_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on a CPU, where bfloat16 is many times slower."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


@dataclass(frozen=True, slots=True)
class Positions:
    """How long a text a model can read."""

    count: int
    """Tokens."""
    fixed: bool
    """Whether there is a table of them, so that one more cannot be read at all; else the model has seen no more."""


def positions(path: str, section: recipe.Model) -> Positions | None:
    """What a model's configuration says of its positions; None where nothing limits them. No weight is loaded.

    Raises UserError when the configuration cannot be loaded, ServiceError when the Hub cannot be reached.
    """
    place, options = located(path)
    trust = section.trust_remote_code
    config = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options, trust_remote_code=trust))
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    if any(getattr(text, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta")):
        return Positions(count, fixed=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=trust)
    # A table may have a few rows more than there are positions: OPT's begins at 2.
    table = any(
        tensor.ndim == 2 and count <= tensor.shape[0] <= count + 8 and ("pos" in name or "wpe" in name)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    )
    return Positions(count, fixed=True) if table else None


def load_model(path: str, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    """The causal language model of one role, with the loading options of the recipe's `model` section.

    Dropout is off: the reference and the policy must agree at step 0, and a resumed run must repeat itself.
    Raises UserError when the folder or Hub model cannot be loaded or lacks weights, MissingError when a package that
    loading it needs is not installed, ServiceError when the Hub cannot be reached.
    """
    place, options = _options(path, section)
    _refuse_classifier(path, options["config"])
    loaded: Any = from_hub(path, lambda: AutoModelForCausalLM.from_pretrained(place, **options))
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"model {path!r} lacks {len(missing)} of its weights, {missing[0]} for one, which transformers would draw "
            "at random; give a complete causal language model"
        )
    return _ready(model, section, trained=trained)


def load_scalar_model(path: str, section: recipe.Model, *, trained: bool, seed: int = 0) -> PreTrainedModel:
    """A sequence-classification model with one output, without dropout: a reward model or a critic.

    One that is trained may come from a language model: its head is then new, drawn by `seed`.
    Raises UserError when a frozen one has no head or a head has other outputs, and as `load_model` does.
    """
    place, options = _options(path, section)
    config = options["config"]
    if config.num_labels != 1 and any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"model {path!r} is a classifier with {config.num_labels} outputs, and a score is one number")
    config.num_labels = 1
    loaded: Any = from_hub(path, lambda: AutoModelForSequenceClassification.from_pretrained(place, **options))
    model: PreTrainedModel = loaded[0]
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"model {path!r} ({type(model).__name__}) has no linear head called `score`; use an architecture that "
            "transformers gives one (Llama, Qwen2, Mistral, Gemma, GPT-2 ...)"
        )
    missing = sorted(key for key in loaded[1]["missing_keys"] if not key.startswith("score."))
    if missing or (loaded[1]["missing_keys"] and not trained):
        raise UserError(
            f"model {path!r} lacks {(missing or ['score.weight'])[0]}, which transformers would draw at random; give "
            "a model with a trained scalar head, such as a stage that trains one"
        )
    if loaded[1]["missing_keys"]:
        generator = torch.Generator().manual_seed(seed)
        spread = getattr(options["config"].get_text_config(), "initializer_range", 0.02)
        head.weight.data.copy_(spread * torch.randn(head.weight.shape, generator=generator))
    return _ready(model, section, trained=trained)


def config_of(path: str, section: recipe.Model) -> Any:
    """A model's configuration, before any weight is loaded. Raises as `load_model` does."""
    return _options(path, section)[1]["config"]


def check_language_model(path: str, section: recipe.Model) -> None:
    """Refuse a model with a scalar head, before any weight is loaded. Raises as `load_model` does."""
    _refuse_classifier(path, config_of(path, section))


def check_scalar_model(path: str, section: recipe.Model) -> None:
    """Refuse a language model where one with a scalar head is meant, before any weight is loaded."""
    architectures = config_of(path, section).architectures or []
    if heads := [name for name in architectures if "CausalLM" in name or "LMHead" in name]:
        raise UserError(
            f"model {path!r} is a {heads[0]}, which scores nothing; give a model with a trained scalar head"
        )


def _refuse_classifier(path: str, config: Any) -> None:
    # With tied embeddings transformers would make a language model of it without a word.
    if heads := [name for name in config.architectures or [] if "SequenceClassification" in name]:
        raise UserError(f"model {path!r} is a {heads[0]}, which writes no text; give a language model")


def _options(path: str, section: recipe.Model) -> tuple[str, dict[str, Any]]:
    """Where a model of a recipe lies and how it is loaded; its configuration is without dropout."""
    model_exists(path)
    place, options = located(path)
    options["trust_remote_code"] = section.trust_remote_code
    config = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options))
    for part in (config, config.get_text_config()):
        for key in part.to_dict():
            if key.endswith(_DROPS) and isinstance(getattr(part, key), float):
                setattr(part, key, 0.0)
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    options |= {"config": config, "dtype": pick_dtype(section.dtype), "output_loading_info": True}
    return place, options


def _ready(model: PreTrainedModel, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    model.config.use_cache = False
    if trained and section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
