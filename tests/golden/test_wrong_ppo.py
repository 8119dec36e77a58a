"""Plausible mistakes in PPO, each far from the golden values: what the golden tests can see.

`formula` is the two losses written once more, response by response, with one switch for each mistake.
"""

from __future__ import annotations

import pytest
import torch
from case import FOLDER, TermsCase, assert_told_apart
from readers import cases_of
from torch import Tensor

from aligndistil.objectives.ppo import PPO

PATH = FOLDER / "ppo.json"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not in the golden folder")

OF_THE_POLICY = [
    "score on every token",
    "score on the last column",
    "score not clipped",
    "KL with the other sign",
    "no KL",
    "KL of the whole response on its last token",
    "a value after the last token",
    "lambda 1",
    "not whitened",
    "whitened response by response",
    "whitened with n - 1",
    "padding counted when whitening",
    "whitened to the mean only",
    "the larger side",
    "not clipped",
    "clip of the log-ratio",
    "mean over all tokens",
    "sum over tokens",
]
OF_THE_CRITIC = [
    "score on the last column",
    "score not clipped",
    "KL with the other sign",
    "a value after the last token",
    "lambda 1",
    "returns of whitened advantages",
    "returns that are the advantages",
    "values not clipped",
    "the smaller error",
    "not halved",
    "mean over all tokens",
]


def golden_case() -> TermsCase:
    return next(case for case in cases_of(PATH) or [] if isinstance(case, TermsCase))


def advantages(case: TermsCase, mistake: str | None) -> list[Tensor]:
    """(n,) of each response."""
    objective, rollout = case.objective, case.rollout
    assert isinstance(objective, PPO)
    assert rollout is not None
    assert objective.reward_clip is not None
    sign = {"KL with the other sign": -1, "no KL": 0}.get(mistake or "", 1)
    lam = 1.0 if mistake == "lambda 1" else objective.gae_lambda
    columns, found = case.batch.response_BT.shape[1], []
    for row, where in enumerate(case.batch.response_BT):
        n = int(where.sum())
        kl, value = (rollout[name][row][where] for name in ("kl_sampled", "critic_value"))
        score = rollout["reward_score"][row, -1]
        if mistake != "score not clipped":
            score = score.clamp(-objective.reward_clip, objective.reward_clip)
        reward = -sign * objective.kl_coef * kl
        if mistake == "KL of the whole response on its last token":
            reward = torch.zeros(n)
            reward[-1] = -objective.kl_coef * kl.sum()
        if mistake == "score on every token":
            reward = reward + score
        elif mistake != "score on the last column" or n == columns - 1:
            reward[-1] += score
        after = (
            rollout["critic_value"][row, n + 1] if mistake == "a value after the last token" and n < columns - 1 else 0
        )
        result, following, later = torch.zeros(n), torch.as_tensor(after), torch.zeros(())
        for t in reversed(range(n)):
            later = reward[t] + objective.gamma * following - value[t] + objective.gamma * lam * later
            result[t], following = later, value[t]
        found.append(result)
    return found


def whitened(found: list[Tensor], columns: int, mistake: str | None) -> list[Tensor]:
    if mistake == "not whitened":
        return found
    if mistake == "whitened response by response":
        return [(a - a.mean()) / a.std(correction=0) for a in found]
    everything = torch.cat(found)
    if mistake == "padding counted when whitening":
        everything = torch.cat([everything, torch.zeros(len(found) * columns - len(everything))])
    std = everything.std(correction=int(mistake == "whitened with n - 1"))
    if mistake == "whitened to the mean only":
        std = torch.ones(())
    return [(a - everything.mean()) / std for a in found]


def averaged(tokens: list[Tensor], mistake: str | None) -> Tensor:
    if mistake == "mean over all tokens":
        return torch.cat(tokens).mean()
    return torch.stack([of.sum() if mistake == "sum over tokens" else of.mean() for of in tokens]).mean()


def policy_loss(case: TermsCase, mistake: str | None) -> tuple[float, Tensor]:
    """With its gradient; with no mistake, the golden ones."""
    assert isinstance(case.objective, PPO)
    assert case.rollout is not None
    leaf, clip = case.terms["logp"].clone().requires_grad_(), case.objective.clip_range
    weights = whitened(advantages(case, mistake), case.batch.response_BT.shape[1] - 1, mistake)
    tokens = []
    for row, where in enumerate(case.batch.response_BT):
        ratio = (leaf[row] - case.rollout["logp"][row])[where].exp()
        near = ratio.clamp(1 - clip, 1 + clip)
        if mistake == "clip of the log-ratio":
            near = ratio.log().clamp(-clip, clip).exp()
        if mistake == "not clipped":
            near = ratio
        side = torch.maximum if mistake == "the larger side" else torch.minimum
        tokens.append(-side(ratio * weights[row], near * weights[row]))
    loss = averaged(tokens, mistake)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


def critic_loss(case: TermsCase, mistake: str | None) -> tuple[float, Tensor]:
    """With its gradient; with no mistake, the golden ones."""
    assert isinstance(case.objective, PPO)
    assert case.rollout is not None
    leaf, clip = case.terms["critic_value"].clone().requires_grad_(), case.objective.value_clip_range
    found = advantages(case, mistake)
    if mistake == "returns of whitened advantages":
        found = whitened(found, 0, None)
    tokens = []
    for row, where in enumerate(case.batch.response_BT):
        value, old = leaf[row][where], case.rollout["critic_value"][row][where]
        target = found[row] if mistake == "returns that are the advantages" else found[row] + old
        near = value if mistake == "values not clipped" else old + (value - old).clamp(-clip, clip)
        side = torch.minimum if mistake == "the smaller error" else torch.maximum
        error = side((value - target) ** 2, (near - target) ** 2)
        tokens.append(error if mistake == "not halved" else error / 2)
    loss = averaged(tokens, mistake)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


def distances(case: TermsCase, loss: float, gradient: Tensor, term: str) -> tuple[float, float]:
    golden = case.loss if term == "logp" else case.critic_loss
    assert golden is not None
    expected = case.gradients[term]
    return abs(loss - golden) / abs(golden), float((gradient - expected).norm() / expected.norm())


def test_the_formula_without_a_mistake_is_the_golden_one() -> None:
    case = golden_case()
    assert max(distances(case, *policy_loss(case, None), "logp")) < 1e-5
    assert max(distances(case, *critic_loss(case, None), "critic_value")) < 1e-9


@pytest.mark.parametrize("mistake", OF_THE_POLICY)
def test_a_mistake_moves_the_policy_s_loss_or_gradient(mistake: str) -> None:
    case = golden_case()
    assert_told_apart(max(distances(case, *policy_loss(case, mistake), "logp")), mistake, least=1e-3)


@pytest.mark.parametrize("mistake", OF_THE_CRITIC)
def test_a_mistake_moves_the_critic_s_loss_or_gradient(mistake: str) -> None:
    case = golden_case()
    assert_told_apart(max(distances(case, *critic_loss(case, mistake), "critic_value")), mistake, least=1e-3)
