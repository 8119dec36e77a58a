import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.objectives.base import Role
from aligndistil.objectives.dpo import DPO
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss, plain_terms


def one_pair() -> tuple[Batch, dict[str, Tensor]]:
    """Log-ratios to the reference: (-1 - 2) - (-3 - 2) = 2 for the chosen response, -4 - (-3) = -1 for the other."""
    batch = collate([Row([5], [6, 1]), Row([5], [1])], DataKind.PAIRS, pad_id=0)
    logp = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, 0.0]])
    ref_logp = torch.tensor([[0.0, -3.0, -2.0], [0.0, -3.0, 0.0]])
    return batch, {"logp": logp, "ref_logp": ref_logp}


def test_the_loss_of_one_pair_by_hand() -> None:
    # beta h = 0.1 (2 - (-1)) = 0.3; -log sigmoid(0.3) = log(1 + exp(-0.3)) = 0.5544
    loss = DPO(beta=0.1).loss(*one_pair())
    assert loss.per_example.tolist() == pytest.approx([math.log1p(math.exp(-0.3))])
    assert loss.per_example.tolist() == pytest.approx([0.5544], abs=5e-5)


def test_the_metrics_of_one_pair_by_hand() -> None:
    metrics = means(DPO(beta=0.1).loss(*one_pair()).metrics)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.3,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -4.0,
            "logps/chosen_token_mean": -1.5,
            "logps/rejected_token_mean": -4.0,
        }
    )


def test_label_smoothing_mixes_in_the_loss_of_the_flipped_pair() -> None:
    # 0.9 log(1 + exp(-0.3)) + 0.1 log(1 + exp(0.3)) = 0.9 * 0.5544 + 0.1 * 0.8544 = 0.5844
    loss = DPO(beta=0.1, label_smoothing=0.1).loss(*one_pair()).per_example
    assert loss.tolist() == pytest.approx([0.9 * math.log1p(math.exp(-0.3)) + 0.1 * math.log1p(math.exp(0.3))])
    assert loss.tolist() == pytest.approx([0.5844], abs=5e-5)


def test_a_policy_that_is_its_reference_has_loss_log_2_and_reward_0() -> None:
    objective, batch = DPO(), ragged_batch(DataKind.PAIRS)
    z = random_logits(objective, batch)[Role.POLICY]
    loss = plain_loss(objective, batch, {Role.POLICY: z, Role.REFERENCE: z.detach()})
    values = {"loss": float(loss.per_example.mean().detach())} | means(loss.metrics)
    torch.testing.assert_close(loss.per_example, torch.full((3,), math.log(2)))
    assert values["rewards/accuracies"] == 0.5, "a tie is half right"
    for expected in objective.first_step():
        assert values[expected.metric] == pytest.approx(expected.value, abs=1e-12)


def test_swapped_responses_give_the_loss_of_the_reversed_preference() -> None:
    objective, batch = DPO(beta=0.3), ragged_batch(DataKind.PAIRS)
    logits = random_logits(objective, batch)
    rows = [1, 0, 3, 2, 5, 4]
    swapped = Batch(batch.kind, batch.ids_BT[rows], batch.attention_BT[rows], batch.response_BT[rows], batch.label_B)
    straight = plain_loss(objective, batch, logits)
    reverse = plain_loss(objective, swapped, {role: z[rows] for role, z in logits.items()})
    # log sigmoid(h) - log sigmoid(-h) = h
    margin_E = straight.per_example - reverse.per_example
    terms = plain_terms(objective, batch, logits)
    logratio_B = (terms["logp"] - terms["ref_logp"]).sum(-1)
    torch.testing.assert_close(margin_E, -0.3 * (logratio_B[0::2] - logratio_B[1::2]))
    assert means(straight.metrics)["rewards/margins"] == pytest.approx(-means(reverse.metrics)["rewards/margins"])


def test_the_gradient_is_minus_beta_sigmoid_of_minus_the_margin() -> None:
    batch, terms = one_pair()
    logp = terms["logp"].requires_grad_()
    (gradient,) = torch.autograd.grad(DPO(beta=0.1).loss(batch, terms).per_example.sum(), logp)
    slope = 0.1 / (1 + math.exp(0.3))
    torch.testing.assert_close(gradient, slope * torch.tensor([[0.0, -1.0, -1.0], [0.0, 1.0, 0.0]]))


def test_a_margin_of_a_thousand_nats_stays_finite() -> None:
    batch, terms = one_pair()
    leaf = (terms["logp"] * 1e4).requires_grad_()
    for sign in (1, -1):
        loss = DPO(beta=1.0).loss(batch, {**terms, "logp": sign * leaf})
        assert loss.per_example.isfinite().all()
        assert gradient_of(loss, leaf).isfinite().all()


@pytest.mark.parametrize("fields", [{"beta": 0}, {"beta": -1}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_fields_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DPO.model_validate(fields)
