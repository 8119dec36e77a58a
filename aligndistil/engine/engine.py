"""One stage's models on DeepSpeed: forward, backward, step, generation and export, the same at every ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aligndistil import recipe
from aligndistil.batch import Batch, DataKind
from aligndistil.engine.compilation import compiles_head, forget_kernels
from aligndistil.engine.config import frozen_config, import_deepspeed
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.divergence import Divergence, LogProbability
from aligndistil.engine.head import backbone
from aligndistil.engine.policy import FrozenModel, Policy, on_device
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel, ScalarNetwork, Scorer, gathered, scalar_output
from aligndistil.engine.teacher_cache import CachedModel
from aligndistil.engine.trained import Trained
from aligndistil.errors import UserError
from aligndistil.maths import sum_tokens
from aligndistil.objectives.base import Loss, Need, Objective, Prepared, Role, State, scalar_term

logger = logging.getLogger(__name__)


class Engine:
    """The trained models and the frozen ones beside them.

    `frozen` are the models of all other roles but the critic; `reward` stands in for the reward model where the reward
    is no model, and `through` between batches and a reward model that reads something else. `temperature` divides the
    logits of all language models.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        frozen: Mapping[str, PreTrainedModel | CachedModel],
        objective: Objective,
        *,
        train: recipe.Train,
        settings: recipe.Engine,
        processes: Processes,
        total_steps: int,
        vocab: int,
        critic: PreTrainedModel | None = None,
        reward: Scorer | None = None,
        temperature: float = 1.0,
        through: Callable[[Scorer], Scorer] | None = None,
    ) -> None:
        self.objective, self.processes, self.vocab = objective, processes, vocab
        self._temperature = temperature
        self._without_direction: set[int] = set()
        self._settings, self._train, self._total_steps = settings, train, total_steps
        self._compiled = compiles_head(settings, processes.device)
        if self._compiled:
            forget_kernels()
        self._share = {"share_prompts": objective.data is DataKind.PAIRS and settings.share_prompts == "auto"}
        self.accumulation = train.batch_size // (train.micro_batch_size * processes.world)
        self._policy = self._trained(policy, objective.is_scalar, train.learning_rate)
        self._critic: Trained | None = None
        if critic is not None:
            self._critic = self._trained(critic, True, train.critic_learning_rate or train.learning_rate)
        self.zero_stage: int = self._policy.zero_stage
        self.offload = settings.offload
        self._frozen: dict[str, FrozenModel | CachedModel] = {}
        self._scorers: dict[str, Scorer] = {}
        for role, model in frozen.items():
            if isinstance(model, CachedModel):
                self._frozen[role] = model
                continue
            if not objective.needs[role].is_scalar:
                self._frozen[role] = self.beside(model, **self._share)
                continue
            model, normalized = self._placed(model), objective.needs[role] is Need.NORMALIZED_SCORE
            with gathered(list(model.parameters())):
                self._scorers[role] = ScalarModel(model, normalized=normalized)
            self._shard(model)
        if reward is not None:
            self._scorers[Role.REWARD] = reward
        elif through is not None:
            self._scorers[Role.REWARD] = through(self._scorers[Role.REWARD])

    def beside(self, model: PreTrainedModel, *, share_prompts: bool = False) -> FrozenModel:
        """A language model that is read beside the policy: replicated, or sharded by ZeRO-3 when the policy is."""
        model = self._placed(model)
        with gathered(list(model.parameters())):  # those of a base that is shared, and sharded already
            frozen = FrozenModel(model, self.vocab, share_prompts=share_prompts)
        self._shard(model)
        return frozen

    def _shard(self, model: PreTrainedModel) -> None:
        if self._settings.zero_stage == 3:
            import_deepspeed().initialize(model=model, config=frozen_config(self._settings, model.dtype))

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        model = on_device(model, self.processes.device)
        if self._settings.compile == "all":
            backbone(model).compile(dynamic=True)
        return model

    def _trained(self, model: PreTrainedModel, scalar: bool, learning_rate: float) -> Trained:
        model = self._placed(model)
        chunk = None if self._settings.chunk_tokens == "auto" else self._settings.chunk_tokens
        with gathered(list(model.parameters())):  # those of a base that is shared, and sharded already
            module: Policy | ScalarNetwork
            if scalar:
                module = ScalarNetwork(model, **self._share)
            else:
                module = Policy(model, self.vocab, chunk, compiled=self._compiled, **self._share)
        return Trained(
            module,
            model,
            learning_rate=learning_rate,
            train=self._train,
            settings=self._settings,
            accumulation=self.accumulation,
            total_steps=self._total_steps,
        )

    def settle(self, batch: Batch) -> None:
        """Make sure that training mode repeats itself: two passes over a batch must agree. Collective.

        A model in which they do not (router noise, layers left out) is trained in evaluation mode from now on, and a
        warning says so. Raises UserError where that does not help.
        """
        for trained in self._all_trained:
            if (difference := self._unrepeated(trained, batch)) <= 1e-4:
                continue
            trained.noiseless = True
            rest = self._unrepeated(trained, batch)
            trained.noiseless = rest < difference / 2
            model, unit = trained.model, "nats" if isinstance(trained.engine.module, Policy) else "score"
            which = f"model {model.config.name_or_path!r} ({type(model).__name__})"
            # Kernels that add in any order differ by their rounding.
            if rest > (0.05 if model.dtype == torch.bfloat16 else 1e-4):
                raise UserError(
                    f"{which} is random: two passes over the first batch differ by {rest:.2g} {unit} a token, in "
                    "evaluation mode too; switch off what draws random numbers in it, or use another model"
                )
            if trained.noiseless and self.processes.is_main:
                logger.warning(
                    "%s is random in training mode: two passes over the first batch differ by %.2g %s a token. Its "
                    "router noise, dropout and the like are switched off: it is trained as it is evaluated",
                    which,
                    difference,
                    unit,
                )

    @torch.no_grad()
    def _unrepeated(self, trained: Trained, batch: Batch) -> float:
        """Mean difference of two passes in training mode at a response token, on the process where it is largest.

        The dropout of adapters is asked for, and is no noise.
        """
        for one in self._all_trained:
            one.set_training(True, dropout=False)
        batch = batch.to(self.processes.device)
        given: tuple[Any, ...] = (LogProbability(), {}) if isinstance(trained.engine.module, Policy) else ()
        with torch.random.fork_rng([self.processes.device] if self.processes.device.type == "cuda" else []):
            passes = [trained.engine(batch, *given) for _ in range(2)]
        first, second = (one["logp"] if isinstance(one, dict) else one for one in passes)
        mean = (first - second)[batch.response_BT].abs().mean().double()
        return float(self.processes.max(mean))

    def terms(
        self, batch: Batch, *, preparing: bool = False, known: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Per-token terms (B, T) of a batch on this process's device: of the objective, and of scalar heads.

        `known` is the derivative of the loss in them, where it is known beforehand.
        """
        needs = self.objective.needs if preparing else self.objective.update_needs
        terms: dict[str, Tensor] = {}
        if not needs[Role.POLICY].is_scalar:
            frozen = {role: model.read(batch) for role, model in self._frozen.items() if role in needs}
            terms = self._policy.engine(
                batch, self.objective, frozen, self._gathered_heads, preparing, known, self._temperature
            )
        for role, need in needs.items():
            if not need.is_scalar:
                continue
            if role in self._scorers:
                outputs_BT = self._scorers[role].scores(batch)
            else:
                trained = self._policy if role == Role.POLICY else self._critic
                assert trained is not None
                outputs_BT = trained.engine(batch)
            terms[scalar_term(role, need)] = scalar_output(outputs_BT, batch, need)
        return terms

    @torch.no_grad()
    def prepare(self, batch: Batch, micro_batches: Sequence[Sequence[int]], state: State) -> Prepared:
        """What the objective finds out about all rows of a batch, without gradient.

        The models read the rows of one micro-batch at a time; the objective is given all rows at once.
        """
        self._set_training(False)
        terms: dict[str, Tensor] = {}
        for rows in micro_batches:
            part = batch.take(rows)
            for name, values in self.terms(part.to(self.processes.device), preparing=True).items():
                whole = terms.setdefault(name, values.new_zeros(batch.ids_BT.shape))
                whole[list(rows), : part.width] = values
        return self.objective.prepare(batch.to(self.processes.device), terms, state)

    def loss(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss:
        """The losses and metrics of a micro-batch, with gradient; `prepared` is what `prepare` found of it."""
        self._set_training(True)
        known = None
        # Where weights are gathered for each forward pass, all processes must make the same ones: none looks ahead.
        gathers = self.zero_stage == 3 and self.processes.world > 1
        if not gathers and batch.examples not in self._without_direction:
            known = loss_direction(self.objective, batch, prepared)
            if known is None:  # it is that of the losses of so many examples, and is not asked for again
                self._without_direction.add(batch.examples)
        batch = batch.to(self.processes.device)
        return self.objective.loss(batch, {**self.terms(batch, known=known), **prepared})

    def backward(self, loss: Loss, *, examples: int, last: bool) -> None:
        """Add the gradient of a micro-batch's losses, each divided by `examples`, those of the step on all processes.

        `last` says that the optimizer step comes next.
        """
        # DeepSpeed averages over processes; the sum over all examples, divided by their number, is what is meant.
        scale = self.processes.world / examples
        self._policy.backward(loss.per_example.sum() * scale, last=last)
        if self._critic is not None:
            assert loss.critic_per_example is not None
            self._critic.backward(loss.critic_per_example.sum() * scale, last=last)

    def step(self) -> dict[str, float]:
        """Clip the gradient, move the weights and the learning rate; the rate that was used, and the norm before."""
        learning_rate, norm = self._policy.step()
        metrics = {"grad_norm": norm, "learning_rate": learning_rate}
        if self._critic is not None:
            rate, critic_norm = self._critic.step()
            metrics |= {"critic/learning_rate": rate, "critic/grad_norm": critic_norm}
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch, prepared: Mapping[str, Tensor]) -> Loss:
        """The losses and metrics of a batch, without gradient."""
        self._set_training(False)
        batch = batch.to(self.processes.device)
        return self.objective.loss(batch, {**self.terms(batch), **prepared})

    @torch.no_grad()
    def divergence(self, batch: Batch, other: FrozenModel) -> Tensor:
        """(B,) KL(policy || other), summed over the response tokens of each row."""
        self._set_training(False)
        batch = batch.to(self.processes.device)
        read = {Role.REFERENCE: other.read(batch)}
        terms = self._policy.engine(batch, Divergence(), read, lambda: self._gathered([other]))
        return sum_tokens(terms[Role.REFERENCE], batch.response_BT)

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> Tensor:
        """(B, T) of the response tokens under the policy itself, at temperature 1 and zero elsewhere."""
        self._set_training(False)
        terms: dict[str, Tensor] = self._policy.engine(batch.to(self.processes.device), LogProbability(), {})
        return terms["logp"]

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The live policy, whole on every process and in evaluation mode."""
        self._set_training(False)
        with torch.no_grad(), gathered(list(self.model.parameters())):
            yield self.model
        self._set_training(True)

    def state_dict(self, *, trained_only: bool = False) -> dict[str, Tensor]:
        """The policy's weights in its own dtype on the CPU, on the first process; empty on the others. Collective.

        Of tied weights only the first name is kept, as in a saved model folder. `trained_only` leaves the rest out.
        """
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) in seen or (trained_only and not tensor.requires_grad):
                continue
            seen.add(id(tensor))
            with gathered([tensor]):
                if self.processes.is_main:
                    state[name] = tensor.detach().to("cpu", copy=True)
        return state

    @property
    def model(self) -> PreTrainedModel:
        """The policy; under ZeRO-3 its weights are whole only inside `generating`."""
        return self._policy.model

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The DeepSpeed engines by name, for checkpoints."""
        engines = {"policy": self._policy.engine}
        return engines if self._critic is None else {**engines, "critic": self._critic.engine}

    @property
    def _all_trained(self) -> list[Trained]:
        return [self._policy] if self._critic is None else [self._policy, self._critic]

    def close(self) -> None:
        """Give the memory back before the next stage."""
        for engine in self.deepspeed.values():
            engine.destroy()
        self._frozen, self._scorers = {}, {}

    def _set_training(self, training: bool) -> None:
        for trained in self._all_trained:
            trained.set_training(training)

    def _gathered_heads(self) -> AbstractContextManager[Any]:
        return self._gathered(self._frozen.values())

    def _gathered(self, models: Iterable[FrozenModel | CachedModel]) -> AbstractContextManager[Any]:
        """Whole heads of frozen models; where one is the policy's own head, the policy gathers it for itself."""
        own = {id(p) for p in self._policy.head.parameters()}
        heads = {id(p): p for model in models for p in model.head.linear.parameters()}
        return gathered([p for key, p in heads.items() if key not in own])
