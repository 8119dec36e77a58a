import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import DataKind, Row, collate
from aligndistil.objectives.base import Need, Role
from aligndistil.objectives.simpo import SimPO, simpo_loss
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss
from support.responses import Formula, Response, distances

PAIRS = ragged_batch(DataKind.PAIRS, examples=4)
OBJECTIVE = SimPO(beta=2.5, gamma_beta_ratio=0.55)


def test_loss_and_metrics_worked_out_by_hand():
    # chosen: (-1 - 3) / 2 = -2 a token; rejected: (-2 - 2 - 2 - 6) / 4 = -3 a token
    # rewards 2 x -2 = -4 and 2 x -3 = -6, margin 2, gamma = 0.25 x 2 = 0.5; loss = log(1 + e^-(2 - 0.5))
    batch = collate([Row([5], [6, 1]), Row([5], [6, 7, 8, 1])], DataKind.PAIRS, pad_id=0)
    logp = torch.tensor([[0.0, -1, -3, 0, 0], [0, -2, -2, -2, -6]])
    loss = SimPO(beta=2, gamma_beta_ratio=0.25).loss(batch, {"logp": logp})
    assert float(loss.per_example) == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-12)
    assert means(loss.metrics) == {
        "rewards/chosen": -4,
        "rewards/rejected": -6,
        "rewards/margins": 2,
        "rewards/margins_above_gamma": 1.5,
        "rewards/accuracies": 1,
        "logps/chosen": -4,
        "logps/rejected": -12,
        "logps/chosen_token_mean": -2,
        "logps/rejected_token_mean": -3,
    }


def test_two_responses_as_likely_per_token_leave_the_margin_to_gamma():
    same = torch.tensor([-2.0])
    loss = simpo_loss(mean_logp_chosen=same, mean_logp_rejected=same, beta=10, gamma=5)
    assert float(loss) == pytest.approx(5 + math.log1p(math.exp(-5)))


def test_no_model_is_read_but_the_policy():
    assert OBJECTIVE.needs == {Role.POLICY: Need.LOGP}


def formula(of_response, margin) -> Formula:
    def losses(said: dict[str, list[Response]]) -> list[Tensor]:
        values = [of_response(response) for response in said[Role.POLICY]]
        return [(1 + (-margin(a - b)).exp()).log() for a, b in zip(values[0::2], values[1::2], strict=True)]

    return losses


RIGHT = formula(lambda y: y.logp.mean(), lambda a: 2.5 * (a - 0.55))
WRONG = {
    "sums": formula(lambda y: y.logp.sum(), lambda a: 2.5 * (a - 0.55)),
    "without EOS": formula(lambda y: y.logp[:-1].sum() / max(1, len(y.ids) - 1), lambda a: 2.5 * (a - 0.55)),
    "divided by the length without EOS": formula(
        lambda y: y.logp.sum() / max(1, len(y.ids) - 1), lambda a: 2.5 * (a - 0.55)
    ),
    "the ratio as gamma": formula(lambda y: y.logp.mean(), lambda a: 2.5 * a - 0.55),
    "gamma added": formula(lambda y: y.logp.mean(), lambda a: 2.5 * (a + 0.55)),
    "no margin": formula(lambda y: y.logp.mean(), lambda a: 2.5 * a),
}


def test_the_formula_written_out_again_agrees():
    assert max(distances(OBJECTIVE, RIGHT, PAIRS, random_logits(OBJECTIVE, PAIRS))) < 1e-9


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_would_be_seen(fault):
    assert max(distances(OBJECTIVE, WRONG[fault], PAIRS, random_logits(OBJECTIVE, PAIRS))) > 1e-4


def test_trls_gamma_is_the_ratio_times_beta():
    logits = random_logits(OBJECTIVE, PAIRS)
    ours = plain_loss(OBJECTIVE, PAIRS, logits)
    trls = plain_loss(SimPO(beta=2.5, simpo_gamma=2.5 * 0.55), PAIRS, logits)
    torch.testing.assert_close(trls.per_example, ours.per_example)
    torch.testing.assert_close(*(gradient_of(loss, logits[Role.POLICY]) for loss in (ours, trls)))


def test_the_default_margin_gives_way_to_gamma():
    assert SimPO().gamma == 5
    assert SimPO(beta=2, gamma_beta_ratio=0).gamma == 0
    assert (SimPO(simpo_gamma=1.4).gamma, SimPO(simpo_gamma=1.4).gamma_beta_ratio) == (1.4, None)


@pytest.mark.parametrize("fields", [{}, {"gamma_beta_ratio": 0.3}, {"simpo_gamma": 1.4}, {"simpo_gamma": 0}])
def test_what_is_written_down_is_read_again(fields):
    objective = SimPO(**fields)
    assert SimPO.model_validate(objective.model_dump()) == objective


def test_both_margins_are_refused_with_what_to_do():
    with pytest.raises(ValidationError, match="gamma = gamma_beta_ratio x beta; keep one of them and remove the other"):
        SimPO(gamma_beta_ratio=0.5, simpo_gamma=5)


@pytest.mark.parametrize("fields", [{"beta": 0}, {"gamma_beta_ratio": -0.1}, {"simpo_gamma": -1}])
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        SimPO(**fields)
