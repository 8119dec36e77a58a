"""Load a causal language model from a folder, the Hub or the package itself, without dropout."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from aligndistil import recipe
from aligndistil.errors import UserError
from aligndistil.models.adapters import (
    Adapter,
    adapter_at,
    check_same_adapter,
    has_adapter,
    import_peft,
    merge_adapter,
    target_modules,
)
from aligndistil.models.places import configured, from_hub, located, model_exists
from aligndistil.models.weights import published_tensors

logger = logging.getLogger(__name__)
_DROPS = ("dropout", "pdrop", "dropout_prob", "layerdrop")
transformers.utils.logging.disable_progress_bar()  # it draws over ours
# What it lists is refused here, in one sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


_WIDE = 512
"""Hidden units from which on products in bfloat16 are twice as fast as in float32 on a CPU that has AMX."""


def pick_dtype(dtype: str, hidden_size: int = _WIDE) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, and for models that are not small on a CPU with AMX: others have no fast products."""
    if dtype == "auto":
        fast = torch.cuda.is_available() or (hidden_size >= _WIDE and _has_amx())
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


@functools.cache
def _has_amx() -> bool:
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


@functools.cache
def _say_dtype(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    why = "this processor has AMX" if dtype == torch.bfloat16 else "the model is small, or this processor has no AMX"
    logger.info("model.dtype: auto is %s on this CPU, since %s", name, why)


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
    place, options = located(configured(path))
    trust = section.trust_remote_code
    config = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options, trust_remote_code=trust))
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    if any(getattr(text, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta")):
        return Positions(count, fixed=False)

    def without_weights() -> Any:
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=trust)

    model = from_hub(path, without_weights)
    # A table may have a few rows more than there are positions: OPT's begins at 2.
    table = any(
        tensor.ndim == 2 and count <= tensor.shape[0] <= count + 8 and ("pos" in name or "wpe" in name)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    )
    return Positions(count, fixed=True) if table else None


def load_model(path: str, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    """The causal language model of one role, with the loading options of the recipe's `model` section.

    Dropout is off: the reference and the policy must agree at step 0, and a resumed run must repeat itself. An adapter
    is merged into the weights of its base. Of a composite model that is `trained` (see `text_part`), everything but
    the language model is frozen.
    Raises UserError when the folder or Hub model cannot be loaded, lacks weights, or has weights that its class has no
    place for, MissingError when a package that loading it needs is not installed, ServiceError when the Hub cannot be
    reached.
    """
    if (adapter := adapter_at(path)) is not None:
        model_exists(path)
        check_language_model(path, section)
        model = merge_adapter(load_model(adapter.base, section, trained=False), adapter)
    else:
        place, options = _options(path, section)
        model = _language_model(path, place, options)
    return ready(model, section, trained=trained)


def load_scalar_model(path: str, section: recipe.Model, *, trained: bool, seed: int = 0) -> PreTrainedModel:
    """A sequence-classification model with one output, without dropout: a reward model or a critic.

    One that is trained may come from a language model: its head is then new, drawn by `seed`.
    Raises UserError when a frozen one has no head or a head has other outputs, and as `load_model` does.
    """
    if (adapter := adapter_at(path)) is not None:
        with_head = check_scalar_adapter(adapter, trained=trained)
        model = load_scalar_model(adapter.base, section, trained=trained or with_head, seed=seed)
        model = merge_adapter(model, adapter)
        note_scale(model, config_of(path, section))
        return ready(model, section, trained=trained)
    place, options = _options(path, section)
    model, new = _scalar_model(path, place, options, trained=trained)
    draw_head(model, new, seed)
    return ready(model, section, trained=trained)


def draw_head(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Draw the parameters of a new scalar head."""
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for name in sorted(names):
        parameter = model.get_parameter(name)
        shape = parameter.shape
        drawn = torch.randn(shape, generator=generator) if parameter.ndim > 1 else torch.zeros(shape)
        parameter.data.copy_(spread * drawn)


def scalar_model_on(model: PreTrainedModel, path: str, section: recipe.Model) -> PreTrainedModel | None:
    """A scalar model whose body has the modules and the weights of a language model's; its head has no memory yet.

    None where a scalar model of this family has another body. `path` is where the language model is.
    """
    _, options = _options(path, section)
    options["config"].num_labels = 1
    given = {"trust_remote_code": section.trust_remote_code, "dtype": model.dtype}
    given |= {name: options[name] for name in ("attn_implementation",) if name in options}
    with torch.device("meta"):
        scalar: PreTrainedModel = from_hub(
            path, lambda: AutoModelForSequenceClassification.from_config(options["config"], **given)
        )
    body = getattr(model, model.base_model_prefix, None)
    if type(getattr(scalar, scalar.base_model_prefix, None)) is not type(body):
        return None
    setattr(scalar, scalar.base_model_prefix, body)
    return scalar


def check_scalar_adapter(adapter: Adapter, *, trained: bool) -> bool:
    """Whether an adapter came with a scalar head. Raises UserError where a frozen one, which scores, came without."""
    with_head = bool(adapter.config.modules_to_save)
    if not with_head and not trained and adapter.config.task_type == "CAUSAL_LM":
        raise UserError(
            f"model {adapter.path!r} is the adapter of a language model, which scores nothing; give a model with a "
            "trained scalar head"
        )
    return with_head


def note_scale(model: PreTrainedModel, config: Any) -> None:
    """Keep what an adapter's own configuration says of its scores."""
    for name in ("score_mean", "score_std"):
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))


def check_weights(path: str, section: recipe.Model, *, scalar: bool, trained: bool) -> None:
    """Refuse a model folder whose tensors are not those of its class, as loading it would; none of them is read.

    A model on the Hub, or with code of its own, is checked when it is loaded. Raises as `load_model` and
    `load_scalar_model` do.
    """
    if (adapter := adapter_at(path)) is not None:
        if scalar:
            trained |= check_scalar_adapter(adapter, trained=trained)
        else:
            check_language_model(path, section)
        return check_weights(adapter.base, section, scalar=scalar, trained=trained)
    if not os.path.isdir(located(path)[0]):
        return
    place, options = _options(path, section)
    options["state_dict"] = published_tensors(path, contents=False)
    if not options["state_dict"] or (section.trust_remote_code and hasattr(options["config"], "auto_map")):
        return
    if scalar:
        _scalar_model(path, place, options, trained=trained)
    else:
        _language_model(path, place, options)


def check_lora(path: str, section: recipe.Model, *, scalar: bool) -> None:
    """Refuse adapters that a model can have none of, before any weight is loaded; a model on the Hub is checked later.

    Raises UserError, and MissingError where PEFT is not installed.
    """
    import_peft()
    if section.lora is None or not os.path.isdir(located(configured(path))[0]):
        return
    _, options = _options(path, section)
    trust = section.trust_remote_code
    auto: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        model = from_hub(path, lambda: auto.from_config(options["config"], trust_remote_code=trust))
    target_modules(model, section.lora)
    if (adapter := adapter_at(path)) is not None:
        check_same_adapter(model, adapter, section.lora)


def text_part(path: str, section: recipe.Model) -> str | None:
    """A sentence about a composite model (text and images, say), of which the language model alone is trained.

    None for a model that is nothing else. Raises as `load_model` does.
    """
    config = config_of(path, section)
    text = config.get_text_config()
    others = [name for name in config.sub_configs if getattr(config, name, None) not in (None, text)]
    if not others or text is config:
        return None
    return (
        f"model {path} ({config.model_type}) is composite: its language model ({text.model_type}) is trained; the rest "
        f"({', '.join(others)}) is exported as it came"
    )


def _language_model(path: str, place: str, options: dict[str, Any]) -> PreTrainedModel:
    config = options["config"]
    _refuse_classifier(path, config)
    model, found = from_hub(path, lambda: _loaded(AutoModelForCausalLM, place, options))
    _refuse_other_shapes(path, found)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {path!r} lacks {len(missing)} of its weights, {missing[0]} for one, which transformers would draw "
            "at random; give a complete causal language model"
        )
    _refuse_leftovers(path, model, config, found["unexpected_keys"])
    return model


def _scalar_model(
    path: str, place: str, options: dict[str, Any], *, trained: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its head's parameters where the head is new."""
    config = options["config"]
    if config.num_labels != 1 and any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"model {path!r} is a classifier with {config.num_labels} outputs, and a score is one number")
    config.num_labels = 1
    model, found = from_hub(path, lambda: _loaded(AutoModelForSequenceClassification, place, options))
    _refuse_other_shapes(path, found)
    body = f"{model.base_model_prefix}."
    missing = sorted(found["missing_keys"])
    lacks = [name for name in missing if not trained or name.startswith(body)]
    if lacks:
        raise UserError(
            f"model {path!r} lacks {lacks[0]}, which transformers would draw at random; give a model with a trained "
            "scalar head, such as a stage that trains one"
        )
    leftovers = found["unexpected_keys"]
    if leftovers:
        leftovers = leftovers - language_head(config, trust_remote_code=options["trust_remote_code"])
    _refuse_leftovers(path, model, config, leftovers)
    return model, missing


def _loaded(auto: Any, place: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """A model, and the names that transformers missed or could not place; on `meta` with a `state_dict` of its own."""
    if "state_dict" in options:
        with torch.device("meta"):
            built = auto.from_config(options["config"])
        return _on_meta(type(built), built.config, options["state_dict"])
    loaded: tuple[PreTrainedModel, dict[str, set[str]]] = auto.from_pretrained(place, **options)
    if has_adapter(loaded[0]):
        raise UserError(f"{place} is an adapter on the Hub; download it (`hf download {place}`), and give the folder")
    return loaded


def _on_meta(kind: Any, config: Any, tensors: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    given = {"config": config, "state_dict": tensors, "device_map": "meta", "output_loading_info": True}
    given["ignore_mismatched_sizes"] = True  # they are refused, as in `_options`
    loaded: tuple[PreTrainedModel, dict[str, set[str]]] = kind.from_pretrained(None, **given)
    return loaded


def language_head(config: Any, *, trust_remote_code: bool) -> set[str]:
    """Names of the language-model head of a model with this configuration, which a scalar head takes the place of."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:  # there is no such language model
        return set()
    head = model.get_output_embeddings()
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if module is head
        for parameter, _ in module.named_parameters()
    }


def _refuse_other_shapes(path: str, found: dict[str, set[Any]]) -> None:
    if others := sorted(found["mismatched_keys"]):
        name, stored, configured = others[0]
        raise UserError(
            f"model {path!r} has {len(others)} tensors of other shapes than its config.json says, {name} for one: "
            f"{tuple(stored)} and {tuple(configured)}; give the configuration that belongs to the weights"
        )


def _refuse_leftovers(path: str, model: PreTrainedModel, config: Any, leftovers: Iterable[str]) -> None:
    """Refuse tensors that the class of a model has no place for, but for those of the other parts of a composite one.

    Those that the class declares as ignorable are no leftovers of transformers'.
    """
    left = sorted(leftovers)
    if left and type(model.config) is not type(config):
        kind = getattr(transformers, next(iter(config.architectures or []), ""), None)
        if kind is not None:
            tensors = published_tensors(path, contents=False)
            left = sorted(from_hub(path, lambda: _on_meta(kind, config, tensors))[1]["unexpected_keys"])
    if left:
        some = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
        raise UserError(
            f"model {path!r} has {len(left)} tensors that {type(model).__name__} (model_type {config.model_type}) has "
            f"no place for: {some}; they would be lost from training and from the export: is model_type right?"
        )


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
    place, options = located(configured(path))
    options["trust_remote_code"] = section.trust_remote_code
    config = from_hub(path, lambda: AutoConfig.from_pretrained(place, **options))
    if not isinstance(config.architectures, list | None):
        raise UserError(f"model {path!r}: `architectures` in its config.json is no list; mend it")
    for part in (config, config.get_text_config()):
        for key in part.to_dict():
            if key.endswith(_DROPS) and isinstance(getattr(part, key), float):
                setattr(part, key, 0.0)
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    dtype = pick_dtype(section.dtype, getattr(config.get_text_config(), "hidden_size", 0))
    options |= {"config": config, "dtype": dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused, in words that transformers does not have
    return place, options


def ready(model: PreTrainedModel, section: recipe.Model, *, trained: bool) -> PreTrainedModel:
    """A loaded model as it is read or trained: without a cache, and with gradients for what text passes through."""
    model.config.use_cache = False
    if trained and section.dtype == "auto" and not torch.cuda.is_available():
        _say_dtype(model.dtype)
    body = getattr(model, model.base_model_prefix, model)
    decoder = model.get_decoder()
    if trained and decoder is not body and model.config.get_text_config() is not model.config:
        # Text does not pass through the rest; ZeRO would let weight decay move it all the same.
        text = {id(parameter) for parameter in decoder.parameters()}
        for parameter in body.parameters():
            parameter.requires_grad_(id(parameter) in text)
    if trained and section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
