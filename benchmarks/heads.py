"""The head alone: what turns hidden states of response tokens into a loss and its gradient, in several ways.

All get the same `Inputs` and leave the gradient in the policy's hidden states and head; each returns the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aligndistil.batch import Batch, DataKind
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.head import Head
from aligndistil.engine.token_terms import FrozenRole, Plan, chunk_size, token_terms
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Objective, Role
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {"aligndistil": AlignDistil(), "dpo": DPO(), "sft": SFT()}
PRODUCT_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens that `Products` projects at once: with more, products grow no faster."""


class Inputs(NamedTuple):
    """What a step has once the models' bodies have run: hidden states of equally long responses, and heads."""

    objective: Objective
    batch: Batch
    hidden: Tensor
    head: Head
    frozen: dict[str, FrozenRole]

    @property
    def weight(self) -> Tensor:
        return self.head.linear.weight

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(
    objective: Objective, *, rows: int, tokens: int, vocab: int, hidden: int, device: str, dtype: torch.dtype
) -> Inputs:
    """`tokens` in all, divided among the rows."""
    torch.manual_seed(0)
    shape = (rows, tokens // rows)
    response_BT = torch.ones(shape, dtype=torch.bool, device=device)
    ids_BT = torch.randint(vocab, shape, device=device)
    batch = Batch(objective.data, ids_BT, response_BT, response_BT, response_BT[:, 0])

    def states() -> Tensor:
        return torch.randn(tokens, hidden, device=device, dtype=dtype)

    def head() -> Head:
        linear = nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
        nn.init.normal_(linear.weight, std=hidden**-0.5)
        return Head(linear, 1.0, None, vocab)

    frozen: dict[str, FrozenRole] = {
        role: FrozenRole(states(), head()) for role in objective.needs if role != Role.POLICY
    }
    for given in frozen.values():
        given.head.linear.requires_grad_(False)
    return Inputs(objective, batch, states().requires_grad_(), head(), frozen)


def ours(given: Inputs, **options: Any) -> float:
    """`options` are further fields of a Plan."""
    vocab, ids = given.head.vocab, given.batch.ids_BT.flatten()
    known = loss_direction(given.objective, given.batch, {})
    flat = None if known is None else {name: value.to(ids.device).flatten() for name, value in known.items()}
    plan = Plan(given.objective, given.head, ids, given.frozen, chunk_size(vocab), flat, **options)
    return _backward(given, token_terms(plan, given.hidden))


def plain(given: Inputs) -> float:
    """The formula as one writes it: for each role log_softmax of the float32 logits of all tokens, and autograd."""
    ids = given.batch.ids_BT.flatten()

    def logps_of(hidden: Tensor, head: Head) -> Tensor:
        return torch.log_softmax((hidden @ head.linear.weight.t()).float(), dim=-1)

    with torch.no_grad():
        logps = {role: logps_of(frozen.hidden, frozen.head) for role, frozen in given.frozen.items()}
    logps[Role.POLICY] = logps_of(given.hidden, given.head)
    if isinstance(given.objective, DPO):
        return _backward(given, plain_dpo(logps, ids))
    assert isinstance(given.objective, AlignDistil)
    measured = measured_aligndistil(given.objective, logps, ids)
    return _backward(given, plain_aligndistil(given.objective, logps) | measured)


def plain_dpo(logps: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    return {"logp": pick(logps[Role.POLICY], ids), "ref_logp": pick(logps[Role.REFERENCE], ids)}


def plain_aligndistil(objective: AlignDistil, logps: dict[str, Tensor]) -> dict[str, Tensor]:
    policy, teacher, reverse = (logps[role] for role in (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER))
    tvd = (teacher.exp() - reverse.exp()).abs().sum(-1) / 2
    alpha = objective.r * tvd + objective.eps
    beta = objective.beta0 / alpha
    target = torch.log_softmax(teacher + alpha[:, None] * (teacher - reverse), dim=-1)
    kl_target = (policy.exp() * (policy - target)).sum(-1)
    terms = {"weighted_kl": beta * kl_target, "kl_target": kl_target.detach()}
    return terms | {"alpha": alpha, "beta": beta, "tvd": tvd}


@torch.no_grad()
def measured_aligndistil(objective: AlignDistil, logps: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The terms that are only logged."""
    policy, teacher, reverse = (logps[role] for role in (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER))
    probs = policy.exp()
    return {
        "reward": objective.beta0 * (pick(teacher, ids) - pick(reverse, ids)),
        "expected_reward": objective.beta0 * (probs * (teacher - reverse)).sum(-1),
        "kl_teacher": (probs * (policy - teacher)).sum(-1),
    }


def pick(logps: Tensor, ids: Tensor) -> Tensor:
    return logps.gather(-1, ids[:, None]).squeeze(-1)


def _backward(given: Inputs, terms: dict[str, Tensor]) -> float:
    shaped = {name: value.reshape(given.batch.ids_BT.shape) for name, value in terms.items()}
    loss = given.objective.loss(given.batch, shaped).per_example.mean()
    loss.backward()
    return float(loss.detach())


class Products:
    """The matrix products that a head cannot do without, and nothing else, in buffers that are there already.

    One for the logits of each model, and two for the gradients of the policy's hidden states and weight.
    """

    def __init__(self, given: Inputs) -> None:
        tokens = min(PRODUCT_TOKENS[given.hidden.device.type], len(given.hidden))
        self._logits = torch.empty(tokens, given.head.vocab, device=given.hidden.device, dtype=given.hidden.dtype)
        self._hidden, self._weight = torch.empty_like(given.hidden), torch.zeros_like(given.weight)

    @torch.no_grad()
    def __call__(self, given: Inputs) -> float:
        models = [(given.hidden, given.weight), *((f.hidden, f.head.linear.weight) for f in given.frozen.values())]
        for start in range(0, len(given.hidden), len(self._logits)):
            rows = slice(start, min(start + len(self._logits), len(given.hidden)))
            logits = self._logits[: rows.stop - rows.start]
            for hidden, weight in models:
                torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(logits, given.weight, out=self._hidden[rows])
            torch.addmm(self._weight, logits.t(), given.hidden[rows], out=self._weight)
        return 0.0


def product_operations(given: Inputs) -> int:
    """Additions and multiplications of `Products`."""
    return 2 * len(given.hidden) * given.weight.numel() * (3 + len(given.frozen))


class LigerDPO:
    """Liger's fused linear DPO loss, which wants chosen rows before rejected ones; mean over pairs."""

    def __init__(self, given: Inputs) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        assert isinstance(given.objective, DPO)
        self._loss = LigerFusedLinearDPOLoss(beta=given.objective.beta, compiled=given.hidden.is_cuda)

    def __call__(self, given: Inputs) -> float:
        rows = given.batch.rows
        order = [*range(0, rows, 2), *range(1, rows, 2)]
        reference = given.frozen[Role.REFERENCE]

        def sorted_states(hidden: Tensor) -> Tensor:
            return hidden.unflatten(0, (rows, -1))[order]

        loss, *_ = self._loss(
            given.weight,
            sorted_states(given.hidden),
            given.batch.ids_BT[order],
            ref_input=sorted_states(reference.hidden),
            ref_weight=reference.head.linear.weight,
        )
        loss.backward()
        return float(loss.detach())


class LigerCrossEntropy:
    """Liger's fused linear cross-entropy (Triton, so on a GPU only); mean over tokens."""

    def __init__(self, given: Inputs) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        assert given.batch.kind is DataKind.RESPONSES
        self._loss = LigerFusedLinearCrossEntropyLoss()

    def __call__(self, given: Inputs) -> float:
        loss = self._loss(given.weight, given.hidden, given.batch.ids_BT.flatten())
        loss.backward()
        return float(loss.detach())
