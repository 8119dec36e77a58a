import math

import pytest
import torch

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.objectives.base import Need, Role
from aligndistil.objectives.reward_model import RewardModel
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss

OBJECTIVE = RewardModel()
EOS = 1
PAIR = collate([Row([5], [EOS, 6, EOS]), Row([5, 7], [EOS])], DataKind.PAIRS, pad_id=EOS)
"""The pad id is EOS, which also stands inside the first response."""
SCORES = {"policy_score": torch.tensor([[0.0, 9.0, 9.0, 2.0], [0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)}


def test_loss_and_metrics_worked_out_by_hand():
    # scores 2 and -1 at the last tokens: log(1 + e^-3); squares (4 + 1) / 2
    loss = OBJECTIVE.loss(PAIR, SCORES)
    assert loss.per_example.tolist() == pytest.approx([math.log1p(math.exp(-3))])
    assert means(loss.metrics) == {
        "rewards/chosen": 2,
        "rewards/rejected": -1,
        "rewards/margins": 3,
        "rewards/accuracies": 1,
        "scores/mean": 0.5,
        "scores/square": 2.5,
    }


def test_the_gradient_is_at_the_last_tokens_alone():
    score = SCORES["policy_score"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVE.loss(PAIR, {"policy_score": score}).per_example.sum(), score)
    slope = 1 / (1 + math.exp(3))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0, -slope], [0.0, 0.0, slope, 0.0]]))


def test_a_constant_on_all_scores_changes_nothing():
    batch = ragged_batch(DataKind.PAIRS, examples=4)
    logits = random_logits(OBJECTIVE, batch)
    moved = {Role.POLICY: logits[Role.POLICY] + 100}
    torch.testing.assert_close(*(plain_loss(OBJECTIVE, batch, z).per_example for z in (logits, moved)))


def test_swapped_responses_give_the_likelihood_of_the_other_preference():
    batch = ragged_batch(DataKind.PAIRS)
    rows = [1, 0, 3, 2, 5, 4]
    logits = random_logits(OBJECTIVE, batch)
    swapped = Batch(batch.kind, batch.ids_BT[rows], batch.attention_BT[rows], batch.response_BT[rows], batch.label_B)
    straight = plain_loss(OBJECTIVE, batch, logits).per_example
    reverse = plain_loss(OBJECTIVE, swapped, {Role.POLICY: logits[Role.POLICY][rows]}).per_example
    torch.testing.assert_close((-straight).exp() + (-reverse).exp(), torch.ones(3))


def test_equal_scores_cost_log_2_and_count_as_half_right():
    loss = OBJECTIVE.loss(PAIR, {"policy_score": torch.full((2, 4), 3.0)})
    assert float(loss.per_example) == pytest.approx(math.log(2))
    assert means(loss.metrics)["rewards/accuracies"] == 0.5


def test_scores_a_thousand_apart_stay_finite():
    score = (SCORES["policy_score"] * 1000).requires_grad_()
    for sign in (1, -1):
        loss = OBJECTIVE.loss(PAIR, {"policy_score": sign * score})
        assert loss.per_example.isfinite().all()
        assert gradient_of(loss, score).isfinite().all()


def test_the_metrics_tell_the_spread_of_all_scores():
    batch = ragged_batch(DataKind.PAIRS, examples=5)
    logits = random_logits(OBJECTIVE, batch)
    measured = means(plain_loss(OBJECTIVE, batch, logits).metrics)
    last = batch.response_BT * torch.arange(batch.ids_BT.shape[1])
    score = logits[Role.POLICY].detach().gather(1, last.argmax(-1, keepdim=True))
    assert measured["scores/mean"] == pytest.approx(float(score.mean()))
    std = math.sqrt(measured["scores/square"] - measured["scores/mean"] ** 2)
    assert std == pytest.approx(float(score.std(correction=0)))


def test_it_trains_a_scalar_head_and_asks_for_no_language_model():
    assert OBJECTIVE.needs == {Role.POLICY: Need.SCORE}
    assert OBJECTIVE.is_scalar
