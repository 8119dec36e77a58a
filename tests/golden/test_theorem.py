"""Theorem 1 of the paper in the sense in which it holds, by enumeration of all responses.

The inputs of the file are tables of log-probabilities after each prefix, of a policy, the DPO model, and the reference
or reverse model. Its numbers are of the KL-regularised return J, the divergence K from the distillation target pi*, and
the gradients of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from case import FOLDER, floats
from torch import Tensor

from aligndistil.maths import kl_divergence
from aligndistil.objectives.aligndistil import AlignDistil, extrapolated_logps
from aligndistil.objectives.bandit import Bandit
from aligndistil.objectives.base import Role
from aligndistil.objectives.reinforce import Reinforce
from support.tabular import TabularMDP, gradient


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """By name, each with its tables; none where the file is missing or does not say what its models are."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "inputs" not in content:
        return {}
    return {
        f"{group}-{name}": {**entry, "tables": content["inputs"][f"H={entry['H']}"]}
        for group, entries in content["expected"].items()
        for name, entry in entries.items()
    }


ENTRIES = [pytest.param(entry, id=name) for name, entry in entries_of(FOLDER / "theorem1.json").items()]
CONTRASTIVE = [param for param in ENTRIES if param.values[0]["kind"] == "contrast"]
pytestmark = pytest.mark.skipif(not ENTRIES, reason=f"{FOLDER} has no theorem1.json with the tables of its models")


@dataclass(frozen=True)
class Setting:
    """A mdp with a reward beta0 (log pi_dpo - log pi_other) and a KL to `base`."""

    mdp: TabularMDP
    beta: float
    beta0: float
    contrastive: bool
    theta: Tensor
    dpo: Tensor
    other: Tensor

    @property
    def base(self) -> Tensor:
        return self.dpo if self.contrastive else self.other

    @property
    def reward(self) -> Tensor:
        """(S, V)"""
        return self.beta0 * (self.dpo - self.other)

    @property
    def target(self) -> Tensor:
        """(S, V) log pi*."""
        alpha = torch.full((self.mdp.states,), self.beta0 / self.beta)
        return extrapolated_logps(
            teacher_logps=self.dpo, other_logps=self.other, alpha=alpha, contrastive=self.contrastive
        )

    @property
    def unnormalised(self) -> Tensor:
        """(S, V) log of pi_base exp(r / beta), whose sum over the vocabulary is Z."""
        return self.base + self.reward / self.beta

    def ascent(self, policy: Tensor, *, prefixes_fixed: bool = False) -> Tensor:
        """J: expected reward minus beta KL(policy || base), summed over the response."""
        logps = torch.log_softmax(policy, -1)
        immediate = (logps.exp() * self.reward).sum(-1) - self.beta * kl_divergence(logps, self.base)
        return self.mdp.expected(policy, immediate, prefixes_fixed=prefixes_fixed)

    def divergence(self, policy: Tensor, *, prefixes_fixed: bool = False) -> Tensor:
        """K: expected KL(policy || pi*), summed over the response."""
        kl = kl_divergence(torch.log_softmax(policy, -1), self.target)
        return self.mdp.expected(policy, kl, prefixes_fixed=prefixes_fixed)

    def distillation_gradient(self, policy: Tensor) -> Tensor:
        """What AlignDistil with a constant weight does on average, per response token."""
        objective = AlignDistil(
            reward="contrastive" if self.contrastive else "vanilla", weight="constant", beta=self.beta, beta0=self.beta0
        )
        other = Role.REVERSE_TEACHER if self.contrastive else Role.REFERENCE
        return self.mdp.expected_gradient(objective, policy, {Role.TEACHER: self.dpo, other: self.other})


def setting(entry: dict[str, Any]) -> Setting:
    mdp = TabularMDP(entry["V"], entry["H"])
    theta, dpo, other = (floats(entry["tables"][name]) for name in ("theta", "dpo", "other"))
    beta0 = entry["ratio"] * entry["beta"]
    return Setting(mdp, entry["beta"], beta0, entry["kind"] == "contrast", theta.requires_grad_(), dpo, other)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def exactly(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_identity_holds_with_its_partition_functions(entry: dict[str, Any]) -> None:
    """J = -beta K + beta E sum log Z, for any policy; log Z depends on the prefix, and so on the policy."""
    s = setting(entry)
    log_z = s.unnormalised.logsumexp(-1)
    assert [float(log_z.min()), float(log_z.max())] == exactly(entry["logZ_range"])
    generator = torch.Generator().manual_seed(5)
    policies = [s.theta.detach(), *(2 * s.mdp.table(generator) for _ in range(4))]
    for policy in policies:
        rest = s.ascent(policy) + s.beta * s.divergence(policy)
        assert abs(float(rest - s.beta * s.mdp.expected(policy, log_z))) < 1e-12


@pytest.mark.parametrize("entry", ENTRIES)
def test_with_prefixes_held_fixed_both_gradients_are_one(entry: dict[str, Any]) -> None:
    """The immediate reward minus beta KL to the base is what AlignDistil's loss descends, for any policy."""
    s = setting(entry)
    myopic = gradient(s.ascent(s.theta, prefixes_fixed=True), s.theta)
    distillation = -s.mdp.horizon * s.distillation_gradient(s.theta)
    torch.testing.assert_close(myopic, distillation, rtol=0, atol=1e-12)
    fixed_divergence = gradient(s.divergence(s.theta, prefixes_fixed=True), s.theta)
    torch.testing.assert_close(-s.beta * fixed_divergence, distillation, rtol=0, atol=1e-12)
    checks = entry["grad_checks_at_random_theta"]
    assert cosine(gradient(s.ascent(s.theta), s.theta), distillation) == exactly(checks["cos_J_vs_minus_fixed"])
    full_divergence = gradient(s.divergence(s.theta), s.theta)
    assert cosine(full_divergence, fixed_divergence) == exactly(checks["cos_fullKL_vs_fixed"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_target_is_where_distillation_rests_and_the_return_still_climbs(entry: dict[str, Any]) -> None:
    """Statement and caveat: pi* ends the distillation, and maximises J only where Z is the same for all prefixes."""
    s = setting(entry)
    assert float(s.distillation_gradient(s.target).norm()) < 1e-12
    assert float(s.divergence(s.target)) == exactly(0)
    assert float(s.ascent(s.target)) == exactly(entry["J_at_pi_star"])
    target = s.target.clone().requires_grad_()
    norm = float(gradient(s.ascent(target), target).norm())
    assert norm == exactly(entry["at_pi_star"]["norm_J"])
    same_z = entry["H"] == 1 or (entry["kind"] == "vanilla" and entry["ratio"] == 1)
    assert norm < 1e-12 if same_z else norm > 1e-9


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_optimum_of_the_return_is_that_of_the_file(entry: dict[str, Any]) -> None:
    s = setting(entry)
    optimum = s.mdp.optimum(s.unnormalised)
    assert float(s.ascent(optimum)) == exactly(entry["J_optimum"])
    assert float(s.beta * optimum[0].logsumexp(-1)) == exactly(entry["J_optimum"])
    assert float(s.divergence(optimum)) == exactly(entry["seqKL_at_rlhf_optimum"])
    leaf = optimum.clone().requires_grad_()
    assert float(gradient(s.ascent(leaf), leaf).norm()) < 1e-12


@pytest.mark.parametrize("entry", CONTRASTIVE)
def test_the_policy_gradients_point_where_the_file_says(entry: dict[str, Any]) -> None:
    """Eq. 42 as intended is the gradient of J on average; as printed, and Eq. 43, they are off by a known angle."""
    s = setting(entry)
    full = -gradient(s.ascent(s.theta), s.theta)
    frozen = {Role.TEACHER: s.dpo, Role.REVERSE_TEACHER: s.other}
    score, literal, returns = (
        s.mdp.horizon * s.mdp.expected_gradient(objective, s.theta, frozen)
        for objective in (
            Bandit(beta=s.beta, beta0=s.beta0),
            Bandit(beta=s.beta, beta0=s.beta0, literal=True),
            Reinforce(beta=s.beta, beta0=s.beta0),
        )
    )
    known = entry["estimators"]
    torch.testing.assert_close(score, full, rtol=0, atol=1e-12)
    assert cosine(literal, full) == exactly(known["eq42_literal_vs_gradJ_cos"])
    assert relative_error(literal, full) == exactly(known["eq42_literal_vs_gradJ_relerr"])
    assert cosine(returns, full) == exactly(known["eq43_vs_gradJ_cos"])
    assert relative_error(returns, full) == exactly(known["eq43_vs_gradJ_relerr"])
    distillation = s.mdp.horizon * s.distillation_gradient(s.theta)
    assert relative_error(distillation, full) == exactly(known["aligndistil_vs_gradJ_relerr"])
