"""One model that is trained: its DeepSpeed engine with optimizer, schedule and gradient norm."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from aligndistil import recipe
from aligndistil.engine.config import deepspeed_config, import_deepspeed, refused_by_deepspeed
from aligndistil.engine.policy import Policy
from aligndistil.engine.scalar import ScalarNetwork

Network: TypeAlias = Policy | ScalarNetwork


class Trained:
    """A module on DeepSpeed. The policy and the critic have one each: they are clipped and scheduled apart."""

    def __init__(
        self,
        module: Network,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        train: recipe.Train,
        settings: recipe.Engine,
        accumulation: int,
        total_steps: int,
    ) -> None:
        self.model, self.head = model, module.head
        self._dropouts = [part for name, part in model.named_modules() if ".lora_dropout." in name]
        self.noiseless = False
        """Whether it is trained in evaluation mode, since it is random in training mode."""
        self.engine: Any
        with refused_by_deepspeed(settings):
            self.engine, *_ = import_deepspeed().initialize(
                model=module,
                config=deepspeed_config(settings, train, accumulation=accumulation, dtype=model.dtype),
                optimizer=_adamw(model, train, learning_rate),
                lr_scheduler=lambda optimizer: schedule(optimizer, train, total_steps),
            )
        self.zero_stage: int = self.engine.zero_optimization_stage()
        if settings.zero_stage == 3:
            from deepspeed.runtime.zero import register_external_parameter

            register_external_parameter(module.projection, module.head.weight)

    def set_training(self, training: bool, *, dropout: bool = True) -> None:
        """Training mode, with or without the dropout of adapters, or evaluation mode."""
        self.engine.train(training)
        if training and self.noiseless:
            for part in self.model.modules():  # what is computed again in the backward pass asks for training mode
                part.training = bool(getattr(part, "gradient_checkpointing", False))
        for part in self._dropouts:
            part.training = training and dropout

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch; `last` says that the optimizer step comes next."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self) -> tuple[float, float]:
        """Take the optimizer step; returns the learning rate it used and the gradient norm before clipping."""
        learning_rate = float(self.engine.get_lr()[0])
        norm: float | None = None
        if self.zero_stage == 0:
            # DeepSpeed reports no norm for plain data parallelism in float32; its gradients are already averaged.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else None
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        return learning_rate, norm


def _adamw(model: PreTrainedModel, train: recipe.Train, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; biases and norm gains are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=train.adam_betas, fused=True)


def schedule(optimizer: torch.optim.Optimizer, train: recipe.Train, steps: int) -> LambdaLR:
    """Up to the learning rate in the last step of the warm-up, then as `train.lr_scheduler` says, down to its floor.

    transformers' schedules take the first step with a rate of 0, so that it changes nothing; here the first of n steps
    of warm-up has 1/n of the rate.
    """
    warmup = math.ceil(train.warmup_ratio * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if train.lr_scheduler == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 1 - done if train.lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
        return train.min_lr_ratio + (1 - train.min_lr_ratio) * shape

    return LambdaLR(optimizer, share)
