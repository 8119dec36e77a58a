from __future__ import annotations

import math

import pytest
import torch

from aligndistil.maths import (
    clipped,
    kl_divergence,
    last_tokens,
    mean_of,
    mean_tokens,
    sum_tokens,
    total_variation,
)
from aligndistil.objectives.actor_critic import (
    clipped_policy_loss,
    clipped_value_loss,
    discounted_sums,
    generalized_advantages,
    kl_of_ratio,
    whiten,
)


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


def test_total_variation_over_a_vocabulary_keeps_the_digits_of_float32() -> None:
    p, q = random_logps(8, 50_000), random_logps(8, 50_000, seed=1)
    torch.testing.assert_close(total_variation(p.float(), q.float()).double(), total_variation(p, q), rtol=5e-6, atol=0)


def test_total_variation_carries_no_gradient() -> None:
    p, q = random_logps(3, 5).requires_grad_(), random_logps(3, 5, seed=1).requires_grad_()
    assert not total_variation(p, q).requires_grad


def test_sums_and_means_of_tokens_are_of_the_response_alone() -> None:
    terms_BT = torch.tensor([[9.0, 1.0, 2.0], [9.0, 9.0, 4.0]])
    response_BT = torch.tensor([[False, True, True], [False, False, True]])
    assert sum_tokens(terms_BT, response_BT).tolist() == [3.0, 4.0]
    assert mean_tokens(terms_BT, response_BT).tolist() == [1.5, 4.0]


def test_a_row_without_response_tokens_has_the_mean_zero() -> None:
    assert mean_tokens(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [0.0]


def test_a_metric_is_a_sum_and_a_count() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert [float(part) for part in mean_of(values)] == [9.0, 3.0]
    assert [float(part) for part in mean_of(values, torch.tensor([True, False, True]))] == [7.0, 2.0]
    assert not mean_of(values).total.requires_grad


def test_the_last_token_is_found_by_position_in_ragged_and_in_left_padded_rows() -> None:
    response_BT = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    assert last_tokens(response_BT).long().tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_clipped_cuts_both_sides_or_nothing() -> None:
    assert clipped(torch.tensor([-25.0, 3.0, 25.0]), 10).tolist() == [-10, 3, 10]
    assert clipped(torch.tensor([-25.0, 25.0]), None).tolist() == [-25, 25]


def test_generalized_advantages_by_hand() -> None:
    # gamma 1/2, lambda 1/2, rewards 1, 2, 4, values 8, 4, 2, and 0 after the last token, whatever stands there
    # delta: 1 + 2 - 8 = -5, 2 + 1 - 4 = -1, 4 - 2 = 2; A = 2, -1 + 2/4 = -1/2, -5 - 1/8
    found = generalized_advantages(
        reward_BT=torch.tensor([[9.0, 1, 2, 4, 9]]),
        value_BT=torch.tensor([[9.0, 8, 4, 2, 9]]),
        response_BT=torch.tensor([[False, True, True, True, False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert found.tolist() == [[0, -5.125, -0.5, 2, 0]]


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_discounted_sums_are_those_of_the_recursion(discount: float, length: int) -> None:
    values = torch.randn(2, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    later, expected = torch.zeros(2, dtype=torch.float64), []
    for t in reversed(range(length)):
        later = values[:, t] + discount * later
        expected.insert(0, later)
    torch.testing.assert_close(discounted_sums(values, discount), torch.stack(expected, 1))


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (0.0, [1 + 4 - 8, 2 + 2 - 4, 4 - 2]),  # the critic's own error at each token
        (1.0, [7 - 8, 6 - 4, 4 - 2]),  # all rewards to come, less the value
    ],
)
def test_lambda_goes_from_the_critic_s_error_to_the_sampled_return(gae_lambda: float, expected: list[float]) -> None:
    found = generalized_advantages(
        reward_BT=torch.tensor([[1.0, 2, 4]]),
        value_BT=torch.tensor([[8.0, 4, 2]]),
        response_BT=torch.ones(1, 3, dtype=torch.bool),
        gamma=1.0,
        gae_lambda=gae_lambda,
    )
    assert found.tolist() == [expected]


def test_whitened_values_have_mean_zero_and_biased_variance_one() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3
    white = whiten(values, mean=values.mean(), square=values.square().mean())
    torch.testing.assert_close(white, (values - values.mean()) / values.std(correction=0))
    same = torch.full((4,), 5.0)
    assert whiten(same, mean=same.mean(), square=same.square().mean()).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("deviation", "white"),
    [
        (1e-2, 1.0),  # variance 1e-4
        (1e-3, 1.0),  # 1e-6
        (1e-5, 0.1),  # 1e-10 counts as 1e-8, whose root is 1e-4: 1e-5 / 1e-4
    ],
)
def test_a_small_variance_is_whitened_and_one_below_1e_8_counts_as_1e_8(deviation: float, white: float) -> None:
    # mean 0, and the mean of the squares is the variance
    values = torch.tensor([deviation, -deviation], dtype=torch.float64)
    found = whiten(values, mean=values.new_tensor(0.0), square=values.new_tensor(deviation**2))
    assert found.tolist() == pytest.approx([white, -white])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 3.0, -3.0, -3.0),
        (1.5, 3.0, -1.2 * 3, 0.0),  # far enough: nothing more is to be gained
        (0.5, 3.0, -0.5 * 3, -0.5 * 3),  # on the wrong side: it may come back
        (0.5, -3.0, 0.8 * 3, 0.0),
        (1.5, -3.0, 1.5 * 3, 1.5 * 3),
    ],
)
def test_a_policy_gains_nothing_from_leaving_the_clip_range(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    logp = torch.tensor([[math.log(ratio) - 2, 5.0]], dtype=torch.float64, requires_grad=True)
    found = clipped_policy_loss(
        logp_BT=logp,
        old_logp_BT=torch.tensor([[-2.0, 0.0]], dtype=torch.float64),
        advantage_BT=torch.tensor([[advantage, 9.0]]),
        response_BT=torch.tensor([[True, False]]),
        clip_range=0.2,
    )
    assert found.tolist() == pytest.approx([loss])
    assert torch.autograd.grad(found.sum(), logp)[0].tolist()[0] == pytest.approx([slope, 0.0])


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.9**2 / 2, -0.9),  # old value 1, return 2: inside the range the plain error
        (1.5, 0.8**2 / 2, 0.0),  # beyond it, held at 1.2
        (0.5, 1.5**2 / 2, -1.5),  # further away than before: pulled back
    ],
)
def test_a_critic_gains_nothing_from_leaving_the_clip_range(value: float, loss: float, slope: float) -> None:
    leaf = torch.tensor([[value, 7.0]], requires_grad=True)
    found = clipped_value_loss(
        value_BT=leaf,
        old_value_BT=torch.tensor([[1.0, 0.0]]),
        return_BT=torch.tensor([[2.0, 0.0]]),
        response_BT=torch.tensor([[True, False]]),
        clip_range=0.2,
    )
    assert found.tolist() == pytest.approx([loss])
    assert torch.autograd.grad(found.sum(), leaf)[0].tolist()[0] == pytest.approx([slope, 0.0])


def test_the_kl_of_ratios_is_the_kl_on_average_and_never_negative() -> None:
    p, q = random_logps(6), random_logps(6, seed=1)
    estimates = kl_of_ratio(p - q)
    assert (estimates >= 0).all()
    torch.testing.assert_close((q.exp() * estimates).sum(), kl_divergence(q, p))
    assert float(kl_of_ratio(torch.tensor(0.0))) == 0.0
