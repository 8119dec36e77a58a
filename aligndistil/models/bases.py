"""The models of a stage that trains adapters: one copy of the weights for all that have the same base."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import PreTrainedModel

from aligndistil import recipe
from aligndistil.models.adapters import (
    Adapter,
    adapter_at,
    add_adapter,
    continue_adapter,
    put_adapter,
    scalar_head,
    shared_copy,
)
from aligndistil.models.load import (
    check_language_model,
    check_scalar_adapter,
    check_scalar_model,
    config_of,
    draw_head,
    load_model,
    load_scalar_model,
    note_scale,
    ready,
    scalar_model_on,
)
from aligndistil.models.places import BUILTIN, located, model_hash


class Bases:
    """Loads the models of one stage, as `load_model` and `load_scalar_model` do where it trains no adapters.

    With `model.lora` a trained model is an adapter on its base, and so is a frozen one that is an adapter folder; a
    frozen one that is a whole model is a base without an adapter. Bases with equal files are loaded once.
    """

    def __init__(self, section: recipe.Model, seed: int = 0) -> None:
        """`seed` draws new adapters and new scalar heads."""
        self._section, self._lora, self._seed = section, section.lora, seed
        self._loaded: dict[str, PreTrainedModel] = {}
        self._scalar: dict[str, PreTrainedModel] = {}

    def language_model(self, path: str, *, trained: bool = False) -> PreTrainedModel:
        """Raises as `load_model` does, and UserError where an adapter is not what the recipe asks for."""
        if self._lora is None:
            return load_model(path, self._section, trained=trained)
        check_language_model(path, self._section)
        adapter = adapter_at(path)
        if adapter is not None and not trained and not adapter.is_of_body_alone:
            return load_model(path, self._section, trained=False)
        base = path if adapter is None else adapter.base
        key = model_hash(base)
        if key not in self._loaded:
            self._loaded[key] = load_model(base, self._section, trained=False)
        model = self._copy_of(self._loaded[key], trained)
        self._adapt(model, base, adapter, trained)
        return model

    def scalar_model(self, path: str, *, trained: bool = False) -> PreTrainedModel:
        """Raises as `load_scalar_model` does, and UserError where an adapter is not what the recipe asks for."""
        if self._lora is None:
            return load_scalar_model(path, self._section, trained=trained, seed=self._seed)
        adapter = adapter_at(path)
        if adapter is None and not trained:
            check_scalar_model(path, self._section)
        new_head = trained or (adapter is not None and check_scalar_adapter(adapter, trained=trained))
        base = path if adapter is None else adapter.base
        model = self._copy_of(self._scalar_base(base, new_head), trained)
        for name, parameter in scalar_head(model).items():
            _replace(model, name, parameter.detach().clone())
        self._adapt(model, base, adapter, trained)
        note_scale(model, config_of(path, self._section))
        for parameter in scalar_head(model).values():
            parameter.requires_grad_(trained)
        return model

    def _scalar_base(self, base: str, new_head: bool) -> PreTrainedModel:
        key = model_hash(base)
        if key not in self._scalar and key in self._loaded:
            body = shared_copy(self._loaded[key])
            if (model := scalar_model_on(body, base, self._section)) is not None:
                for name, parameter in scalar_head(model).items():
                    _replace(model, name, torch.empty_like(parameter, device=body.device))
                draw_head(model, scalar_head(model), self._seed)
                self._scalar[key] = ready(model, self._section, trained=False)
        if key not in self._scalar:
            self._scalar[key] = load_scalar_model(base, self._section, trained=new_head, seed=self._seed)
        return self._scalar[key]

    def _copy_of(self, base: PreTrainedModel, trained: bool) -> PreTrainedModel:
        model: PreTrainedModel = shared_copy(base)
        return ready(model, self._section, trained=trained).requires_grad_(False)

    def _adapt(self, model: PreTrainedModel, base: str, adapter: Adapter | None, trained: bool) -> None:
        if adapter is not None and trained:
            assert self._lora is not None
            continue_adapter(model, adapter, self._lora)
        elif adapter is not None:
            put_adapter(model, adapter)
        elif trained:
            assert self._lora is not None
            local = os.path.isdir(located(base)[0]) and not base.startswith(BUILTIN)
            add_adapter(model, self._lora, os.path.abspath(base) if local else base, self._seed)


def _replace(model: nn.Module, name: str, values: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, nn.Parameter(values))
