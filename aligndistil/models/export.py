"""Save what was trained: a model as an ordinary Hugging Face folder (what was published, plus training), or an adapter
as PEFT's."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from aligndistil import recipe
from aligndistil.files import replace_folder, start_folder
from aligndistil.models.adapters import WEIGHTS, adapter_config, adapter_state
from aligndistil.models.places import ADAPTER, from_hub, located, whole_base_of
from aligndistil.models.tokenizers import published_tokenizer, tokenized
from aligndistil.models.weights import published_file, published_tensors

_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What the other parts of a composite model are read with."""
_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALE = ("score_mean", "score_std")
"""Of a reward model's scores, where its training measured them."""


def export_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    start: str,
    section: recipe.Model,
    stops: frozenset[int],
    folder: Path,
    card: str,
) -> None:
    """Write weights, configuration, tokenizer, generation configuration and card, all of them or none.

    All but what was trained is as in the model that training started from: `start` is its folder or Hub id, `section`
    how it was loaded. Tensors have its names and dtypes; those that training had no place for (the other parts of a
    composite model, say) are written back. The generation configuration stops at every id that training treated as an
    end. Where a scalar head took the place of a language model's, the configuration says so; and its tokenizer pads
    with a token that ends no text, for transformers finds the token to score by looking for padding.
    Where training started from an adapter, what it was published with is its base's.
    """
    partial = start_folder(folder)
    tokens, start = tokenized(_at_commit(start, model)), _at_commit(whole_base_of(start), model)
    file = published_file(start, "config.json")
    assert file is not None  # the model was loaded from it
    text = file.read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    # Its own files are rewritten below; transformers refuses to save some generation settings that models come with.
    kept: Any = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    tensors = _tensors(model, state, config, start)
    model.save_pretrained(partial, state_dict=tensors, save_original_format=False)
    model.generation_config = kept
    (partial / "generation_config.json").unlink(missing_ok=True)
    tokenizer = _write_tokenizer(tokens, section, stops, partial, scoring=not model.can_generate())
    if model.can_generate():
        _write_generation(model, start, stops, partial)
    else:
        text = _as_json(_scalar_config(model, config, start, section, tokenizer))
    (partial / "config.json").write_text(text, encoding="utf-8")
    _copy(_BESIDE, start, partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    replace_folder(folder)


def export_adapter(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    start: str,
    section: recipe.Model,
    stops: frozenset[int],
    folder: Path,
    card: str,
) -> None:
    """Write an adapter, its configuration, the tokenizer and the card, all of them or none, as PEFT reads them.

    `state` are the trained parameters, `start` the folder or Hub id that training started from: a whole model or an
    adapter. An adapter that scores has a configuration of the model too, with the scale of its scores.
    """
    partial = start_folder(folder)
    base = whole_base_of(start)
    save_file(adapter_state(model, state), partial / WEIGHTS, metadata={"format": "pt"})
    (partial / ADAPTER).write_text(_as_json(adapter_config(model)), encoding="utf-8")
    tokens = tokenized(_at_commit(start, model))
    tokenizer = _write_tokenizer(tokens, section, stops, partial, scoring=not model.can_generate())
    if not model.can_generate():
        file = published_file(_at_commit(base, model), "config.json")
        assert file is not None  # the model was loaded from it
        config = _scalar_config(model, json.loads(file.read_text(encoding="utf-8")), base, section, tokenizer)
        (partial / "config.json").write_text(_as_json(config), encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    replace_folder(folder)


def _at_commit(start: str, model: PreTrainedModel) -> str:
    """The place of a model by its commit: a branch may have moved since, and the Hub may not answer."""
    place, revision = located(start)
    commit: str | None = getattr(model.config, "_commit_hash", None)
    on_hub = commit and revision.get("revision") != commit and not os.path.isdir(place)
    return f"{place}@{commit}" if on_hub else start


def _write_tokenizer(
    start: str, section: recipe.Model, stops: frozenset[int], folder: Path, *, scoring: bool
) -> PreTrainedTokenizerBase:
    """The files as they came, or a tokenizer that was changed as transformers saves it."""
    tokenizer = published_tokenizer(start, section)
    # As transformers saves a tokenizer, it may not come back as it was; code of its own is copied by `save_pretrained`.
    changed = section.chat_template is not None or "auto_map" in tokenizer.init_kwargs
    if scoring:
        pad = _scoring_pad(tokenizer, stops)
        changed |= pad != tokenizer.pad_token or tokenizer.padding_side != "right"
        tokenizer.pad_token, tokenizer.padding_side = pad, "right"
    if changed:
        for option in ("is_local", "local_files_only"):  # of loading it; transformers would write them down
            tokenizer.init_kwargs.pop(option, None)
        tokenizer.save_pretrained(folder)
    else:
        _copy((*_OF_TOKENIZERS, *tokenizer.vocab_files_names.values()), start, folder)
    return tokenizer


def _copy(names: Iterable[str], start: str, folder: Path) -> None:
    for name in dict.fromkeys(names):
        if (file := published_file(start, name)) is not None:
            shutil.copy(file, folder / name)


def _scalar_config(
    model: PreTrainedModel,
    config: dict[str, Any],
    start: str,
    section: recipe.Model,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A published configuration with a scalar head, the scale of its scores and the padding of the tokenizer."""
    if _is_part(model, config):
        place, revision = located(start)
        options = revision | {"trust_remote_code": section.trust_remote_code}
        config = from_hub(start, lambda: AutoConfig.from_pretrained(place, **options)).get_text_config().to_dict()
    if config.get("architectures") != [type(model).__name__]:
        config = config | {"architectures": [type(model).__name__]}
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config = {name: value for name, value in config.items() if name not in _SCALE}
    config.get("text_config", config)["pad_token_id"] = tokenizer.pad_token_id
    return config | {name: getattr(model.config, name) for name in _SCALE if hasattr(model.config, name)}


def _is_part(model: PreTrainedModel, published: dict[str, Any]) -> bool:
    """Whether the model is only the language model of a composite one."""
    kind: str | None = published.get("model_type")
    return model.config.model_type != kind


def _tensors(model: PreTrainedModel, state: dict[str, Tensor], config: dict[str, Any], start: str) -> dict[str, Tensor]:
    """All tensors of the exported model, by the names and in the dtypes that they were published with."""
    published = published_tensors(start)
    tensors: dict[str, Tensor] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    tensors = {_published_name(name, tensors, published, model): tensor for name, tensor in tensors.items()}
    untouched = set[str]()
    if not _is_part(model, config):
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        untouched = {name for name in published if any(pattern.search(name) for pattern in ignored)}
    elif model.can_generate():  # a scalar head has no place for the other parts
        if strange := tensors.keys() - published.keys():
            raise RuntimeError(f"{start} has no tensor called as that of its language model: {min(strange)}")
        tied = tuple(f".{name}" for name in model.all_tied_weights_keys)
        untouched = {name for name in published if not f".{name}".endswith(tied)}
    untouched -= tensors.keys()
    common = Counter(tensor.dtype for tensor in published.values() if tensor.dtype in _DTYPES)
    default = common.most_common(1)[0][0] if common else model.dtype
    for name, tensor in tensors.items():
        dtype = published[name].dtype if name in published else default
        if tensor.is_floating_point() and dtype in _DTYPES:
            tensors[name] = tensor.to(dtype)
    return tensors | {name: published[name].clone() for name in untouched}


def _published_name(
    name: str, tensors: Mapping[str, Tensor], published: Mapping[str, Tensor], model: PreTrainedModel
) -> str:
    """What a tensor was called where the model came from."""
    if name in published:
        return name
    # A model published without its head has the names of the body.
    if (short := name.removeprefix(f"{model.base_model_prefix}.")) in published:
        return short
    # The language model of a composite one has shorter names: all of them have a place behind one prefix.
    for place in published:
        prefix = place.removesuffix(name)
        if place.endswith(f".{name}") and all(prefix + other in published for other in tensors):
            return place
    return name


def _write_generation(model: PreTrainedModel, start: str, stops: frozenset[int], folder: Path) -> None:
    """The published settings as they came; without any, those that transformers makes of the configuration."""
    file = published_file(start, "generation_config.json")
    text = model.generation_config.to_json_string() if file is None else file.read_text(encoding="utf-8")
    settings = json.loads(text)
    ends = settings.get("eos_token_id")
    if set(ends if isinstance(ends, list) else [ends]) != stops:
        settings["eos_token_id"] = sorted(stops) if len(stops) > 1 else min(stops)
        text = _as_json(settings)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _as_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _scoring_pad(tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> str | None:
    """The token to pad with; None where each may end a text: transformers then scores one text at a time."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return str(tokenizer.pad_token)
    special = [str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in stops]
    special = [token for token in special if token not in (tokenizer.bos_token, tokenizer.eos_token)]
    return min(special, key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token), default=None)
