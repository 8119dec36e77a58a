"""The numbers of theorem1.json in float64, by enumeration of all responses of H tokens; nothing tested is imported.

A table (S, V) holds log-probabilities, or logits, after each of the S prefixes, shorter ones first. With the reward
r = beta0 (log pi_dpo - log pi_other), beta0 = ratio x beta, and a base that is pi_dpo (contrastive) or pi_other
(vanilla), J is the expected sum of r less beta KL(policy || base), and K the expected sum of KL(policy || pi*), pi*
proportional to base exp(r / beta): theorem 1 of Zhang et al. 2025.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Content = dict[str, Any]


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def theorem1(inputs: Content, groups: Content) -> Content:
    return {
        group: {name: _entry(inputs[f"H={entry['H']}"], entry) for name, entry in entries.items()}
        for group, entries in groups.items()
    }


def _entry(tables: Content, given: Content) -> Content:
    vocab, horizon, beta = given["V"], given["H"], given["beta"]
    beta0 = given["ratio"] * beta
    prefixes = [p for n in range(horizon) for p in itertools.product(range(vocab), repeat=n)]
    responses = list(itertools.product(range(vocab), repeat=horizon))
    state = torch.tensor([[prefixes.index(y[:t]) for t in range(horizon)] for y in responses])
    token = torch.tensor(responses)

    dpo, other = floats(tables["dpo"]), floats(tables["other"])
    base = dpo if given["kind"] == "contrast" else other
    reward = beta0 * (dpo - other)
    unnormalised = base + reward / beta
    target = torch.log_softmax(unnormalised, -1)

    def of_tokens(table: Tensor) -> Tensor:
        """(Y, H) the table's entry for each token of each response."""
        return table[state, token]

    def expected_return(logits: Tensor) -> Tensor:
        """J, of whole responses: the KL is that of their log-probabilities."""
        logp = of_tokens(torch.log_softmax(logits, -1)).sum(-1)
        return (logp.exp() * (of_tokens(reward).sum(-1) - beta * (logp - of_tokens(base).sum(-1)))).sum()

    def distillation(logits: Tensor, q: Tensor, *, fixed: bool) -> Tensor:
        """Expected sum of KL(policy || q); `fixed` as if the prefixes were given and not sampled."""
        logps = torch.log_softmax(logits, -1)
        chance = of_tokens(logps).sum(-1).exp()
        return ((chance.detach() if fixed else chance) * (logps.exp() * (logps - q)).sum(-1)[state].sum(-1)).sum()

    def slope(value: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(value, at, retain_graph=True)[0].flatten()

    theta, rest = floats(tables["theta"]).requires_grad_(), target.clone().requires_grad_()
    climb = slope(expected_return(theta), theta)
    fixed, full = (slope(distillation(theta, target, fixed=f), theta) for f in (True, False))

    logps = of_tokens(torch.log_softmax(theta, -1))
    chance, total = logps.sum(-1).exp().detach(), of_tokens(reward).sum(-1)
    to_go = of_tokens(reward).flip(-1).cumsum(-1).flip(-1)
    # equations 42, as printed, and 43, on average over all responses, without the division by their length
    literal = slope((chance * (total - beta) * logps.sum(-1)).sum(), theta)
    penalty = beta * distillation(theta, base, fixed=True)
    returns = slope((chance * (to_go * logps).sum(-1)).sum() - penalty, theta)

    def towards(found: Tensor) -> tuple[float, float]:
        """Cosine to the gradient of J, and distance from it, relatively."""
        return F.cosine_similarity(found, climb, dim=0).item(), ((found - climb).norm() / climb.norm()).item()

    # the best policy draws responses in proportion to the product of the unnormalised entries of their tokens
    best = torch.log_softmax(of_tokens(unnormalised).sum(-1), 0)
    log_z = unnormalised.logsumexp(-1)
    return {
        **{name: given[name] for name in ("kind", "ratio", "beta", "H", "V")},
        "logZ_range": [log_z.min().item(), log_z.max().item()],
        "J_optimum": (beta * of_tokens(unnormalised).sum(-1).logsumexp(0)).item(),
        "J_at_pi_star": expected_return(target).item(),
        "seqKL_at_rlhf_optimum": (best.exp() * (best - of_tokens(target).sum(-1))).sum().item(),
        "grad_checks_at_random_theta": {
            "cos_J_vs_minus_fixed": towards(-fixed)[0],
            "cos_fullKL_vs_fixed": F.cosine_similarity(full, fixed, dim=0).item(),
        },
        "at_pi_star": {"norm_J": slope(expected_return(rest), rest).norm().item()},
        "estimators": {
            **dict(zip(("eq42_literal_vs_gradJ_cos", "eq42_literal_vs_gradJ_relerr"), towards(literal), strict=True)),
            **dict(zip(("eq43_vs_gradJ_cos", "eq43_vs_gradJ_relerr"), towards(returns), strict=True)),
            "aligndistil_vs_gradJ_relerr": towards(-beta * fixed)[1],
        },
    }
