import pytest
import torch
from torch import Tensor

from aligndistil.batch import DataKind, Row, collate
from aligndistil.maths import kl_divergence
from aligndistil.objectives.bandit import Bandit, bandit_loss
from aligndistil.objectives.base import OnPolicy, Role
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, means, plain_loss, plain_terms
from support.responses import Formula, Response, distances, kl, responses
from support.tabular import TabularMDP, gradient

BATCH = ragged_batch(DataKind.RESPONSES, examples=5)
SCORE = Bandit(beta=0.08, beta0=0.1)
LITERAL = Bandit(beta=0.08, beta0=0.1, literal=True)
LOGITS = random_logits(SCORE, BATCH)
ROLES = (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER)


@pytest.mark.parametrize(
    ("literal", "loss", "slope"),
    [
        (False, 2.0, -1 / 2),  # -(3 - 0.5 x 4) x -4 / 2, and its weight alone
        (True, 7.0, -2.5 / 2),  # -(3 x -4 - 0.5 x 4) / 2, and -(3 - 0.5) / 2
    ],
)
def test_loss_and_slope_worked_out_by_hand(literal, loss, slope):
    # R = 3, log pi = -4, log pi_teacher = -8 and so q = 4, beta 0.5, two tokens
    logp = torch.tensor([-4.0], requires_grad=True)
    found = bandit_loss(
        logp_B=logp,
        logratio_B=logp + 8,
        reward_B=torch.tensor([3.0]),
        length_B=torch.tensor([2.0]),
        beta=0.5,
        literal=literal,
    )
    assert float(found.detach()) == loss
    assert float(torch.autograd.grad(found, logp)[0]) == slope


def test_metrics_worked_out_by_hand():
    batch = collate([Row([5], [6, 1])], DataKind.RESPONSES, pad_id=0)
    terms = {
        "logp": torch.tensor([[0, -0.5, -1.0]]),
        "teacher_logp": torch.tensor([[0, -1.0, -3.0]]),
        "reward": torch.tensor([[0, 1.0, 2.0]]),
        "kl_teacher": torch.tensor([[0, 4.0, 6.0]]),
    }
    loss = SCORE.loss(batch, terms)
    assert means(loss.metrics) == {
        "reward/token_mean": 1.5,
        "reward/sequence": 3,
        "reward/sequence_square": 9,
        "kl/policy_teacher": 10,
        "kl/policy_teacher_token": 5,
        "kl/policy_teacher_sampled": 2.5,
    }


@pytest.mark.parametrize(("objective", "kl_weight"), [(SCORE, 0.08), (LITERAL, None)])
def test_the_gradient_is_a_weight_times_the_score_of_the_response(objective, kl_weight):
    """(R - beta q) as intended, (R - beta) as printed, over |y|: the KL term of the latter is a constant."""
    expected = torch.zeros_like(LOGITS[Role.POLICY])
    rows = zip(*(responses(BATCH, LOGITS[role].detach()) for role in ROLES), strict=True)
    for row, (policy, teacher, reverse) in enumerate(rows):
        reward = 0.1 * (teacher.logp - reverse.logp).sum()
        penalty = 0.08 if kl_weight is None else kl_weight * (policy.logp - teacher.logp).sum()
        weight = -(reward - penalty) / len(policy.ids) / BATCH.rows
        at = BATCH.response_BT[row].nonzero().squeeze(-1) - 1
        score = -policy.logps.exp()
        score[torch.arange(len(policy.ids)), policy.ids] += 1
        expected[row, at] = weight * score
    found = gradient_of(plain_loss(objective, BATCH, LOGITS), LOGITS[Role.POLICY])
    torch.testing.assert_close(found, expected)


def formula(loss) -> Formula:
    """`loss` of R, log pi, q and |y|."""

    def losses(said: dict[str, list[Response]]) -> list[Tensor]:
        found = []
        for policy, teacher, reverse in zip(*(said[role] for role in ROLES), strict=True):
            reward = (0.1 * (teacher.logp - reverse.logp).sum()).detach()
            logp = policy.logp.sum()
            found.append(loss(reward, logp, logp - teacher.logp.sum().detach(), len(policy.ids)))
        return found

    return losses


RIGHT = {
    SCORE: formula(lambda reward, logp, q, n: -(reward - 0.08 * q).detach() * logp / n),
    LITERAL: formula(lambda reward, logp, q, n: -(reward * logp - 0.08 * q) / n),
}
WRONG = {
    "a log-ratio with gradient": formula(lambda reward, logp, q, n: -(reward - 0.08 * q) * logp / n),
    "no KL": formula(lambda reward, logp, q, n: -reward * logp / n),
    "not divided by the length": formula(lambda reward, logp, q, n: -(reward - 0.08 * q).detach() * logp),
    "reward of a token": formula(lambda reward, logp, q, n: -(reward / n - 0.08 * q).detach() * logp / n),
    "the other sign": formula(lambda reward, logp, q, n: -(reward + 0.08 * q).detach() * logp / n),
    "as printed": RIGHT[LITERAL],
}


@pytest.mark.parametrize("objective", RIGHT, ids=["score", "literal"])
def test_the_formula_written_out_again_agrees(objective):
    assert max(distances(objective, RIGHT[objective], BATCH, LOGITS)) < 1e-9


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_would_be_seen_in_the_gradient(fault):
    assert distances(SCORE, WRONG[fault], BATCH, LOGITS)[1] > 1e-4


def test_a_log_ratio_with_gradient_would_not_be_seen_in_the_loss():
    assert distances(SCORE, WRONG["a log-ratio with gradient"], BATCH, LOGITS)[0] < 1e-12


def test_on_average_it_climbs_reward_minus_beta_kl_and_the_printed_form_ignores_the_kl():
    """For responses of two tokens: the gradient of J by |y|, and that of the reward alone by |y|."""
    mdp, generator = TabularMDP(vocab=3, horizon=2), torch.Generator().manual_seed(2)
    policy, dpo, reverse = (torch.log_softmax(mdp.table(generator), -1) for _ in range(3))
    frozen = {Role.TEACHER: dpo, Role.REVERSE_TEACHER: reverse}
    leaf = policy.clone().requires_grad_()
    logps = torch.log_softmax(leaf, -1)
    reward = mdp.expected(leaf, (logps.exp() * 0.1 * (dpo - reverse)).sum(-1))
    divergence = mdp.expected(leaf, kl_divergence(logps, dpo))
    climbs = -gradient(reward - 0.08 * divergence, leaf) / 2
    torch.testing.assert_close(mdp.expected_gradient(SCORE, policy, frozen), climbs)
    logps = torch.log_softmax(leaf, -1)
    reward = mdp.expected(leaf, (logps.exp() * 0.1 * (dpo - reverse)).sum(-1))
    torch.testing.assert_close(mdp.expected_gradient(LITERAL, policy, frozen), -gradient(reward, leaf) / 2)


def test_the_exact_kl_is_that_of_the_policy_from_the_teacher_and_not_trained_on():
    terms = plain_terms(SCORE, BATCH, LOGITS)
    assert (terms["logp"].requires_grad, terms["kl_teacher"].requires_grad) == (True, False)
    both = zip(*(responses(BATCH, LOGITS[role].detach()) for role in (Role.POLICY, Role.TEACHER)), strict=True)
    expected = torch.cat([kl(policy.logps, teacher.logps) for policy, teacher in both])
    torch.testing.assert_close(terms["kl_teacher"][BATCH.response_BT], expected)


def test_it_samples_its_responses():
    assert SCORE.on_policy is OnPolicy.ALWAYS
