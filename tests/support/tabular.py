"""A decision process that can be enumerated: a row for every response, and logits of its own for every prefix."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.objectives.base import Objective, Role
from support.plain_formula import plain_loss

PROMPT = [0]


class TabularMDP:
    """Expectations over all responses of `horizon` tokens, exact and differentiable in a table (S, V) of logits.

    S counts the prefixes, shorter ones first; a table row holds the logits after its prefix.
    """

    def __init__(self, vocab: int, horizon: int) -> None:
        prefixes = [p for length in range(horizon) for p in itertools.product(range(vocab), repeat=length)]
        number = {prefix: s for s, prefix in enumerate(prefixes)}
        responses = list(itertools.product(range(vocab), repeat=horizon))
        self.states, self.vocab, self.horizon = len(prefixes), vocab, horizon
        self.batch: Batch = collate([Row(PROMPT, y) for y in responses], DataKind.RESPONSES, pad_id=0)
        self._token_BH = torch.tensor(responses)
        self._state_BH = torch.tensor([[number[y[:t]] for t in range(horizon)] for y in responses])

    def table(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.states, self.vocab, generator=generator, dtype=torch.float64)

    def logp(self, table: Tensor) -> Tensor:
        """(B,) log pi(y|x)."""
        return torch.log_softmax(table, -1)[self._state_BH, self._token_BH].sum(-1)

    def expected(self, policy: Tensor, values_S: Tensor, *, prefixes_fixed: bool = False) -> Tensor:
        """The expected sum of a value of each prefix that a response passes; optionally as if prefixes were given."""
        probability_B = self.logp(policy).exp()
        if prefixes_fixed:
            probability_B = probability_B.detach()
        return (probability_B * values_S[self._state_BH].sum(-1)).sum()

    def optimum(self, unnormalised: Tensor) -> Tensor:
        """A table whose policy draws responses in proportion to exp(the summed entries of their tokens).

        It is a backward recursion: to each entry comes the log of the sum over all that may follow.
        """
        after, tables = torch.zeros(self.vocab**self.horizon), []
        first = self.states
        for length in reversed(range(self.horizon)):
            first -= self.vocab**length
            tables.insert(0, unnormalised[first : first + self.vocab**length] + after.view(-1, self.vocab))
            after = tables[0].logsumexp(-1)
        return torch.cat(tables)

    def expected_gradient(self, objective: Objective, policy: Tensor, frozen: Mapping[str, Tensor]) -> Tensor:
        """(S, V) the gradient of the objective's loss that samples of the policy give on average."""
        leaf = policy.detach().clone().requires_grad_()
        tables = {Role.POLICY: leaf, **frozen}
        loss = plain_loss(objective, self.batch, {role: self._logits(table) for role, table in tables.items()})
        weight_B = self.logp(policy).exp().detach()
        return torch.autograd.grad((weight_B * loss.per_example).sum(), leaf)[0]

    def _logits(self, table: Tensor) -> Tensor:
        """(B, T, V): after the prompt and after each token but the last, whose logits nothing looks at."""
        after = table[self._state_BH]
        return torch.cat([after, torch.zeros_like(after[:, :1])], dim=1)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]
