"""LoRA adapters: folders that PEFT writes and reads, and the models of a stage, of which those of one base share it.

Models that share a base are models like any other: each has modules of its own, an adapter of its own or none, and is
in training or evaluation mode by itself. Only the parameters of the base are the same tensors in all of them, and they
are never trained. So nothing is switched on and off between forward passes.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aligndistil import recipe
from aligndistil.errors import MissingError, UserError, did_you_mean, listed
from aligndistil.models.places import base_of

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Of the names in an adapter's file: PEFT wraps a model twice."""
_NAME = "default"
"""What PEFT calls the one adapter of a model."""
_WORDS = {"lm_head", "embed_tokens", "wte", "embed_out", "embed_in"}
_LIKE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")


def import_peft() -> Any:
    """Raises MissingError where it is not installed."""
    try:
        return importlib.import_module("peft")  # a name for mypy would depend on whether it is installed
    except ImportError as error:
        raise MissingError(
            f"adapters need PEFT, which cannot be imported ({error}); install it with `pip install aligndistil[lora]`"
        ) from error


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder holds."""

    path: str
    base: str
    """The path of the model that it was trained on."""
    config: Any
    """PEFT's LoraConfig, without the scalar head."""
    tensors: dict[str, Tensor]
    """By the names that they have in the model, but for the name of the adapter; those of a scalar head too."""

    @property
    def is_of_body_alone(self) -> bool:
        """Whether it leaves the embeddings and the head of its base as they are, so that others may read them."""
        layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in self.tensors}
        return not (layers & _WORDS or self.config.modules_to_save or self.config.trainable_token_indices)


def adapter_at(path: str) -> Adapter | None:
    """The adapter in a folder; None where the path is that of a whole model.

    Raises UserError when the folder holds another kind of adapter than LoRA, or no weights.
    """
    base = base_of(path)
    if base is None:
        return None
    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(path)
        tensors = load_file(Path(path) / WEIGHTS)
    except Exception as error:  # whatever PEFT makes of somebody's files
        raise UserError(f"adapter {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"adapter {path!r} is of the kind {config.peft_type.value}; give a LoRA adapter")
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return Adapter(path, base, config, named)


def layers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that may have an adapter, by name: the linear ones of the body (of a composite model, of its text)."""
    inside = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()  # a scalar model has none
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def target_modules(model: PreTrainedModel, lora: recipe.Lora) -> list[str]:
    """The layers to give an adapter, by the end of their names where that is not ambiguous.

    Raises UserError when a name of the recipe is that of no layer of the model, or of one that can have none.
    """
    layers, names = layers_of(model), [name for name, _ in model.named_modules()]
    if lora.target_modules != "all-linear":
        for end in lora.target_modules:
            matched = _ending(names, end)
            if not matched:
                known = {name.rpartition(".")[2] for name in layers}
                raise UserError(f"model.lora.target_modules: no layer is called `{end}`{did_you_mean(end, known)}")
            if others := [name for name in matched if name not in layers]:
                known = {name.rpartition(".")[2] for name in layers}
                raise UserError(
                    f"model.lora.target_modules: `{end}` is {others[0]}, which is no linear layer of the body; there "
                    f"are {listed(sorted(known))}"
                )
        return list(lora.target_modules)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    ambiguous = [end for end in ends if not layers.keys() >= set(_ending(names, end))]
    return sorted(name for name in layers if name.rpartition(".")[2] in ambiguous) + [
        end for end in ends if end not in ambiguous
    ]


def _ending(names: list[str], end: str) -> list[str]:
    return [name for name in names if name == end or name.endswith(f".{end}")]


def add_adapter(model: PreTrainedModel, lora: recipe.Lora, base: str, seed: int) -> None:
    """Give a frozen model a new adapter, which is trained and changes nothing yet. The same seed gives the same.

    Raises as `target_modules`.
    """
    peft, alpha = import_peft(), lora.alpha
    revision = getattr(model.config, "_commit_hash", None)
    config = peft.LoraConfig(
        base_model_name_or_path=base.rpartition("@")[0] if revision and "@" in base else base,
        revision=revision,
        r=lora.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora),
        task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers_of(model).values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config)
    for parameter in _adapter_parameters(model).values():
        parameter.requires_grad_(True)


def put_adapter(model: PreTrainedModel, adapter: Adapter) -> Any:
    """Give a model the adapter of a folder, and the scalar head that came with it; returns PEFT's `LoraModel` of it.

    Raises UserError when the tensors are not those that the configuration asks for in this model.
    """
    config, heads = copy.deepcopy(adapter.config), scalar_head(model)
    kept = [name for name in config.modules_to_save or [] if not any(key.startswith(f"{name}.") for key in heads)]
    config.modules_to_save = kept or None
    tuner = _inject(model, config)
    if not model.can_generate():
        for name, parameter in heads.items():
            if name in adapter.tensors:
                parameter.data.copy_(_fitting(adapter, name, parameter))
    rest = {name: tensor for name, tensor in adapter.tensors.items() if name not in heads}
    own, peft = _adapter_parameters(model), import_peft()
    for name, parameter in own.items():
        _fitting(adapter, name, parameter)
    if strange := sorted(rest.keys() - own.keys()):
        raise UserError(f"adapter {adapter.path!r} has {strange[0]}, for which its base {adapter.base!r} has no place")
    peft.set_peft_model_state_dict(model, rest, adapter_name=_NAME)
    model.requires_grad_(False)
    return tuner


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A whole model: the weights of the base with what the adapter adds to them."""
    if model.config.get_text_config().tie_word_embeddings and not adapter.is_of_body_alone and model.can_generate():
        raise UserError(
            f"adapter {adapter.path!r} changes the embeddings or the head of its base, which are one matrix there, and "
            "cannot be merged into it; use an adapter of other layers"
        )
    merged: PreTrainedModel = put_adapter(model, adapter).merge_and_unload()
    return merged.requires_grad_(True)


def continue_adapter(model: PreTrainedModel, adapter: Adapter, lora: recipe.Lora) -> None:
    """Give a frozen model a copy of an adapter, to be trained further. Raises as `check_same_adapter`."""
    check_same_adapter(model, adapter, lora)
    config = copy.deepcopy(adapter.config)
    config.inference_mode, config.lora_dropout = False, lora.dropout
    put_adapter(model, Adapter(adapter.path, adapter.base, config, adapter.tensors))
    for parameter in _adapter_parameters(model).values():
        parameter.requires_grad_(True)


def check_same_adapter(model: PreTrainedModel, adapter: Adapter, lora: recipe.Lora) -> None:
    """Refuse to train an adapter further that is another than the recipe asks for."""
    asked = import_peft().LoraConfig(r=lora.r, lora_alpha=lora.alpha)
    others = [
        f"{name}: {there} and not {wanted}"
        for name in _LIKE
        if (there := getattr(adapter.config, name)) != (wanted := getattr(asked, name))
    ]
    names = [name for name, _ in model.named_modules()]
    layers = {layer for end in target_modules(model, lora) for layer in _ending(names, end)}
    theirs = {name.partition(".lora_")[0] for name in adapter.tensors if ".lora_" in name}
    if layers != theirs:
        others.append(f"other layers, {min(layers ^ theirs)} for one")
    if others:
        raise UserError(
            f"model.lora: training goes on with the adapter of {adapter.path!r}, which has {others[0]}; write what it "
            "has, or start from the whole model that `aligndistil merge` makes of it"
        )


def shared_copy(module: nn.Module) -> Any:
    """A model with modules of its own around the same parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def scalar_head(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters beside the body of a sequence-classification model; empty for a language model."""
    body = f"{model.base_model_prefix}."
    own = {} if model.can_generate() else dict(model.named_parameters())
    return {name: parameter for name, parameter in own.items() if not name.startswith(body)}


def adapter_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained parameters by the names that they have in an adapter's file."""
    return {f"{_PREFIX}{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous() for name, tensor in state.items()}


def adapter_config(model: PreTrainedModel) -> dict[str, Any]:
    """What PEFT writes of a model's adapter, in JSON's types."""
    config: Any = copy.deepcopy(model.peft_config[_NAME])
    config.inference_mode = True
    config.modules_to_save = sorted({name.partition(".")[0] for name in scalar_head(model)}) or None
    written: dict[str, Any] = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}


def has_adapter(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def _inject(model: PreTrainedModel, config: Any) -> Any:
    tuner = import_peft().LoraModel(model, config, _NAME)
    for parameter in _adapter_parameters(model).values():
        parameter.data = parameter.data.to(model.dtype)
    return tuner


def _adapter_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """By the names in an adapter's file, but for the prefix."""
    return dict(_named(model))


def _named(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if f".{_NAME}." in name or name.endswith(f".{_NAME}"):
            yield name.replace(f".{_NAME}", "").replace(".modules_to_save", ""), parameter


def _fitting(adapter: Adapter, name: str, parameter: Tensor) -> Tensor:
    tensor = adapter.tensors.get(name)
    if tensor is None:
        raise UserError(f"adapter {adapter.path!r} lacks {name}; give the folder as PEFT wrote it")
    if tensor.shape != parameter.shape:
        raise UserError(
            f"adapter {adapter.path!r} does not fit its base {adapter.base!r}: {name} is {tuple(tensor.shape)} where "
            f"{tuple(parameter.shape)} is needed"
        )
    return tensor
