import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.objectives.base import Need, Prepares, Role
from aligndistil.objectives.kto import KTO, kto_loss
from support.micro_batches import random_work
from support.plain_formula import gradient_of, means, plain_loss, step_means

OBJECTIVE = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)


def two_responses() -> tuple[Batch, dict[str, Tensor]]:
    """Log-ratios (-1 - 2) - (-3 - 2) = 2 of a desirable response, and -4 - (-3) = -1 of an undesirable one."""
    batch = collate([Row([5], [6, 1], label=True), Row([5], [1], label=False)], DataKind.UNPAIRED, pad_id=0)
    logp = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, 0.0]])
    ref_logp = torch.tensor([[0.0, -3.0, -2.0], [0.0, -3.0, 0.0]])
    return batch, {"logp": logp, "ref_logp": ref_logp}


def test_loss_and_metrics_worked_out_by_hand():
    # z0 = 0.4: gains 0.5 (2 - 0.4) = 0.8 and 0.5 (0.4 + 1) = 0.7; 1 - sigmoid(x) = 1 / (1 + e^x)
    batch, terms = two_responses()
    loss = OBJECTIVE.loss(batch, {**terms, "kl/mismatched": torch.tensor(0.4)})
    assert loss.per_example.tolist() == pytest.approx([2 / (1 + math.exp(0.8)), 3 / (1 + math.exp(0.7))])
    assert means(loss.metrics) == pytest.approx(
        {
            "rewards/desirable": 1,
            "rewards/undesirable": -0.5,
            "logps/desirable": -3,
            "logps/undesirable": -4,
            "labels/desirable": 0.5,
            "kl/z0": 0.4,
        }
    )


def test_the_reference_point_is_clamped_after_the_mean_over_the_step():
    # log-ratios 2 and -1 in two micro-batches: the mean is 0.5, that of the clamped ones would be 1
    batch, terms = two_responses()
    one_row = [
        (collate([Row([5], [6, 1])], DataKind.UNPAIRED, 0), {name: t[:1] for name, t in terms.items()}),
        (collate([Row([5], [1])], DataKind.UNPAIRED, 0), {name: t[1:, :2] for name, t in terms.items()}),
    ]
    means = step_means([OBJECTIVE.prepare(*part, {}) for part in one_row])
    assert {name: float(mean) for name, mean in means.items()} == {"kl/mismatched": 0.5}
    below = OBJECTIVE.loss(batch, {**terms, "kl/mismatched": torch.tensor(-7.0)})
    assert float(below.metrics["kl/z0"].total) == 0
    torch.testing.assert_close(
        below.per_example, OBJECTIVE.loss(batch, {**terms, "kl/mismatched": torch.tensor(0.0)}).per_example
    )


def test_nothing_flows_into_the_reference_point():
    z0 = torch.tensor(0.4, requires_grad=True)
    ratio = torch.tensor([2.0, -1.0], requires_grad=True)
    losses = kto_loss(
        logratio_B=ratio,
        desirable_B=torch.tensor([True, False]),
        z0=z0,
        beta=0.5,
        desirable_weight=1,
        undesirable_weight=1,
    )
    assert torch.autograd.grad(losses.sum(), [ratio, z0], allow_unused=True)[1] is None


def test_desirable_responses_become_likelier_and_undesirable_ones_less_so():
    batch, terms = two_responses()
    logp = terms["logp"].requires_grad_()
    loss = OBJECTIVE.loss(batch, {**terms, "kl/mismatched": torch.tensor(0.4)})
    (gradient,) = torch.autograd.grad(loss.per_example.sum(), logp)

    def slope(gain):
        """Of 1 / (1 + e^gain), beta included."""
        return 0.5 * math.exp(gain) / (1 + math.exp(gain)) ** 2

    up, down = -2 * slope(0.8), 3 * slope(0.7)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, up, up], [0.0, down, 0.0]]))


def test_metrics_are_means_over_the_responses_of_their_label():
    # log-ratios 2, 4 and -1: rewards 1 and 2 of the desirable ones, -0.5 of the other; logps -3, -1 and -4
    rows = [Row([5], [6, 1], label=True), Row([5], [1], label=True), Row([5], [1], label=False)]
    terms = {
        "logp": torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, 9.0], [0.0, -4.0, 9.0]]),
        "ref_logp": torch.tensor([[0.0, -3.0, -2.0], [0.0, -5.0, 9.0], [0.0, -3.0, 9.0]]),
        "kl/mismatched": torch.tensor(0.4),
    }
    metrics = OBJECTIVE.loss(collate(rows, DataKind.UNPAIRED, pad_id=0), terms).metrics
    assert {name: (float(total), float(count)) for name, (total, count) in metrics.items()} == {
        "rewards/desirable": (3, 2),
        "rewards/undesirable": (-0.5, 1),
        "logps/desirable": (-4, 2),
        "logps/undesirable": (-4, 1),
        "labels/desirable": (2, 3),
        "kl/z0": (pytest.approx(1.2), 3),
    }


def test_a_step_without_a_label_leaves_its_metrics_out():
    batch = collate([Row([5], [6, 1]), Row([5], [1])], DataKind.UNPAIRED, pad_id=0)
    metrics = OBJECTIVE.loss(batch, {**two_responses()[1], "kl/mismatched": torch.tensor(0.4)}).metrics
    assert [name for name, (_, count) in metrics.items() if not count] == ["rewards/undesirable", "logps/undesirable"]
    assert float(metrics["rewards/desirable"].count) == 2


def test_a_gain_of_a_thousand_nats_stays_finite():
    batch, terms = two_responses()
    leaf = (terms["logp"] * 1e4).requires_grad_()
    for sign in (1, -1):
        loss = OBJECTIVE.loss(batch, {**terms, "logp": sign * leaf, "kl/mismatched": torch.tensor(0.4)})
        assert loss.per_example.isfinite().all()
        assert gradient_of(loss, leaf).isfinite().all()


def test_a_policy_that_is_its_reference_has_half_the_weight_as_its_loss():
    work = random_work(OBJECTIVE, examples=4)
    logits = {**work.logits, Role.REFERENCE: work.logits[Role.POLICY]}
    loss = plain_loss(OBJECTIVE, work.batch, logits, {"kl/mismatched": torch.zeros(())})
    torch.testing.assert_close(loss.per_example, torch.where(work.batch.label_B, 1.0, 1.5))


def test_the_loss_at_the_first_step_is_known_where_both_labels_weigh_the_same():
    assert {
        expected.metric: expected.value for expected in KTO(desirable_weight=3, undesirable_weight=3).first_step()
    } == {
        "kl/mismatched": 0,
        "loss": 1.5,
    }
    assert [expected.metric for expected in OBJECTIVE.first_step()] == ["kl/mismatched"]


def test_what_may_differ_at_the_first_step_is_in_the_unit_of_the_metric():
    """Of log-ratios, in nats; a loss moves by beta times as much, times its weight."""
    same_weights = KTO(beta=0.5, desirable_weight=3, undesirable_weight=3)
    assert [expected.tolerance for expected in same_weights.first_step()] == pytest.approx([0.01, 0.015])


def test_it_reads_unpaired_responses_and_looks_at_mismatched_ones_first():
    assert (KTO.data, KTO.prepares) == (DataKind.UNPAIRED, Prepares.MISMATCHED)
    assert OBJECTIVE.needs == OBJECTIVE.update_needs == {Role.POLICY: Need.LOGP, Role.REFERENCE: Need.LOGP}


@pytest.mark.parametrize("fields", [{"beta": 0}, {"desirable_weight": -1}, {"undesirable_weight": -1}])
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        KTO(**fields)
