from __future__ import annotations

import math

import pytest
import torch

from aligndistil.maths import kl_divergence, mean_of, mean_tokens, sum_tokens, total_variation


def random_logps(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(*shape, generator=generator, dtype=torch.float64) * 3, dim=-1)


def test_kl_divergence_by_hand() -> None:
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log(3/2) + 1/4 log(1/2)
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl_divergence(p, p)) == 0.0


def test_kl_divergence_differentiates_both_sides() -> None:
    p, q = random_logps(3, 5).requires_grad_(), random_logps(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (p, q))
    written_out = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), written_out)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(kl_divergence(p, q), (p, q), weights),
        torch.autograd.grad(written_out, (p, q), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_kl_divergence_with_one_frozen_side(frozen: int) -> None:
    sides = [random_logps(3, 5), random_logps(3, 5, seed=1)]
    sides[1 - frozen].requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(*sides).sum(), sides[1 - frozen])
    (expected,) = torch.autograd.grad((sides[0].exp() * (sides[0] - sides[1])).sum(), sides[1 - frozen])
    torch.testing.assert_close(gradient, expected)


def test_kl_divergence_leaves_its_inputs_alone() -> None:
    p, q = random_logps(3, 5).requires_grad_(), random_logps(3, 5, seed=1)
    before = p.detach().clone(), q.clone()
    kl_divergence(p, q).sum().backward()
    total_variation(p, q)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_a_token_of_probability_zero_under_the_policy_costs_nothing() -> None:
    p = torch.log_softmax(torch.tensor([0.0, -2000.0]), dim=-1)
    q = torch.tensor([0.5, 0.5]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(2))


def test_total_variation_has_the_factor_one_half() -> None:
    # |3/4 - 1/4| + |1/4 - 3/4| = 1, halved
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(total_variation(p, q)) == pytest.approx(0.5)
    disjoint = torch.tensor([[0.0, -800.0], [-800.0, 0.0]])
    assert float(total_variation(disjoint[0], disjoint[1])) == 1.0
    assert float(total_variation(p, p)) == 0.0


def test_sums_and_means_of_tokens_are_of_the_response_alone() -> None:
    terms_BT = torch.tensor([[9.0, 1.0, 2.0], [9.0, 9.0, 4.0]])
    response_BT = torch.tensor([[False, True, True], [False, False, True]])
    assert sum_tokens(terms_BT, response_BT).tolist() == [3.0, 4.0]
    assert mean_tokens(terms_BT, response_BT).tolist() == [1.5, 4.0]


def test_a_metric_is_a_sum_and_a_count() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert [float(part) for part in mean_of(values)] == [9.0, 3.0]
    assert [float(part) for part in mean_of(values, torch.tensor([True, False, True]))] == [7.0, 2.0]
    assert not mean_of(values).total.requires_grad
