"""One stage's models on DeepSpeed: forward, backward, step, generation and export, the same at every ZeRO stage."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from aligndistil import recipe
from aligndistil.batch import Batch
from aligndistil.engine.config import deepspeed_config, frozen_config
from aligndistil.engine.head import check_head
from aligndistil.engine.policy import FrozenModel, Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.objectives.base import Loss, Objective, Role


class StepInfo(NamedTuple):
    """What one optimizer step did."""

    learning_rate: float
    """The rate the step was taken with."""
    grad_norm: float
    """Before clipping."""


class Engine:
    """The trained policy and the frozen models beside it."""

    def __init__(
        self,
        policy: PreTrainedModel,
        frozen: Mapping[Role, PreTrainedModel],
        objective: Objective,
        *,
        train: recipe.Train,
        settings: recipe.Engine,
        processes: Processes,
        total_steps: int,
        vocab: int,
    ) -> None:
        self.objective, self.processes = objective, processes
        self.vocab = vocab
        self.accumulation = train.batch_size // (train.micro_batch_size * processes.world)
        dtype = policy.dtype
        chunk = None if settings.chunk_tokens == "auto" else settings.chunk_tokens
        module = Policy(on_device(policy, processes.device), vocab, chunk)
        check_head(policy, module.head)
        deepspeed = _import_deepspeed()
        self._model = policy
        self._engine, *_ = deepspeed.initialize(
            model=module,
            config=deepspeed_config(settings, train, accumulation=self.accumulation, dtype=dtype),
            optimizer=_adamw(policy, train),
            lr_scheduler=lambda optimizer: _schedule(optimizer, train, total_steps),
        )
        self.zero_stage: int = self._engine.zero_optimization_stage()
        if settings.zero_stage == 3:
            from deepspeed.runtime.zero import register_external_parameter

            register_external_parameter(module.projection, module.head.linear.weight)
        self._frozen = {role: self._freeze(model, vocab, settings) for role, model in frozen.items()}

    def _freeze(self, model: PreTrainedModel, vocab: int, settings: recipe.Engine) -> FrozenModel:
        frozen = FrozenModel(on_device(model, self.processes.device), vocab)
        check_head(model, frozen.head)
        if settings.zero_stage == 3:
            _import_deepspeed().initialize(model=model, config=frozen_config(settings, model.dtype))
        return frozen

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's per-token terms (B, T) of a batch on this process's device."""
        frozen = {role: model.read(batch) for role, model in self._frozen.items()}
        terms: dict[str, Tensor] = self._engine(batch, self.objective, frozen, self._gathered_heads)
        return terms

    def micro_step(self, batch: Batch, *, examples: int, last: bool) -> Loss:
        """Add the gradient of one micro-batch. `examples` is the global number of examples of the whole step."""
        self._engine.train()
        batch = batch.to(self.processes.device)
        loss = self.objective.loss(batch, self.terms(batch))
        # DeepSpeed averages over processes; the sum over all examples, divided by their number, is what is meant.
        scaled = loss.per_example.sum() * (self.processes.world / examples)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(scaled, scale_wrt_gas=False)
        if not last:
            self._engine.step()
        return loss

    def step(self) -> StepInfo:
        """Take the optimizer step that the last `micro_step` of a global batch has prepared."""
        learning_rate = float(self._engine.get_lr()[0])
        norm = self._stage0_norm() if self.zero_stage == 0 else None
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        return StepInfo(learning_rate, norm)

    def _stage0_norm(self) -> float | None:
        """DeepSpeed reports no norm for plain data parallelism in float32; its gradients are already averaged."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Loss:
        """The loss and metrics of a batch, without gradient."""
        self._engine.eval()
        batch = batch.to(self.processes.device)
        return self.objective.loss(batch, self.terms(batch))

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The live policy, whole on every process and in evaluation mode."""
        self._engine.eval()
        with torch.no_grad(), self._gathered(list(self._model.parameters())):
            yield self._model
        self._engine.train()

    def state_dict(self) -> dict[str, Tensor]:
        """The policy's weights in its own dtype on the CPU, on the first process; empty on the others. Collective.

        Of tied weights only the first name is kept, as in a saved model folder.
        """
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            with self._gathered([tensor]):
                if self.processes.is_main:
                    state[name] = tensor.detach().to("cpu", copy=True)
        return state

    @property
    def model(self) -> PreTrainedModel:
        """The policy; under ZeRO-3 its weights are whole only inside `generating`."""
        return self._model

    @property
    def deepspeed(self) -> Any:
        """The DeepSpeed engine, for checkpoints."""
        return self._engine

    def close(self) -> None:
        """Give the memory back before the next stage."""
        self._engine.destroy()
        self._frozen = {}

    def _gathered_heads(self) -> AbstractContextManager[Any]:
        weights = [p for model in self._frozen.values() for p in model.head.linear.parameters()]
        return self._gathered(weights)

    def _gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        from deepspeed.runtime.zero import GatheredParameters

        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        context: AbstractContextManager[Any] = GatheredParameters(sharded, enabled=bool(sharded))
        return context


def _adamw(model: PreTrainedModel, train: recipe.Train) -> torch.optim.Optimizer:
    """AdamW; biases and norm gains are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.adam_betas)


def _schedule(optimizer: torch.optim.Optimizer, train: recipe.Train, steps: int) -> LambdaLR:
    """From 0 up to the learning rate over the warm-up, then as `train.lr_scheduler` says, down to its floor."""
    warmup = math.ceil(train.warmup_ratio * steps)

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        if train.lr_scheduler == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 1 - done if train.lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
        return train.min_lr_ratio + (1 - train.min_lr_ratio) * shape

    return LambdaLR(optimizer, share)


def _import_deepspeed() -> Any:
    deepspeed = importlib.import_module("deepspeed")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed would compile a C++ kernel for CPU collectives, even for one process; gloo does without.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
