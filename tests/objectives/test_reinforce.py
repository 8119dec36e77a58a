import pytest
import torch
from torch import Tensor

from aligndistil.batch import DataKind, Row, collate
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Need, OnPolicy, Role
from aligndistil.objectives.reinforce import Reinforce, reinforce_loss, returns_to_go
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import means, plain_loss
from support.responses import Formula, Response, distances, kl
from support.tabular import TabularMDP

BATCH = ragged_batch(DataKind.RESPONSES, examples=5)
OBJECTIVE = Reinforce(beta=0.08, beta0=0.1)
LOGITS = random_logits(OBJECTIVE, BATCH)


def test_returns_to_go_worked_out_by_hand():
    # 1 + 2 + 4 = 7, 2 + 4 = 6, 4; what stands before and after the response is not in the sum
    response = torch.tensor([[False, False, True, True, True, False]])
    returns = returns_to_go(reward_BT=torch.tensor([[9.0, 9, 1, 2, 4, 9]]), response_BT=response)
    assert returns[response].tolist() == [7, 6, 4]


def test_loss_and_metrics_worked_out_by_hand():
    # r = 1, 2: G = 3, 2; -1/2 [3 x -0.5 - 0.1 x 4 + 2 x -1 - 0.1 x 6] = (1.5 + 0.4 + 2 + 0.6) / 2 = 2.25
    batch = collate([Row([5], [6, 1])], DataKind.RESPONSES, pad_id=0)
    terms = {
        "logp": torch.tensor([[0, -0.5, -1.0]]),
        "teacher_logp": torch.tensor([[0, -1.0, -3.0]]),
        "reward": torch.tensor([[0, 1.0, 2.0]]),
        "kl_teacher": torch.tensor([[0, 4.0, 6.0]]),
    }
    loss = Reinforce(beta=0.1).loss(batch, terms)
    assert float(loss.per_example) == pytest.approx(2.25)
    assert means(loss.metrics) == {
        "reward/token_mean": 1.5,
        "reward/sequence": 3,
        "reward/sequence_square": 9,
        "returns/token_mean": 2.5,
        "kl/policy_teacher": 10,
        "kl/policy_teacher_token": 5,
        "kl/policy_teacher_sampled": 2.5,
    }


def test_nothing_flows_into_the_returns():
    # -1/2 [G_t log pi - beta KL]: slopes -G_t / 2 in log pi and beta / 2 in the KL
    names = {"logp_BT": [-0.5, -1.0], "return_BT": [3.0, 2.0], "kl_BT": [4.0, 6.0]}
    leaves = {name: torch.tensor([values], requires_grad=True) for name, values in names.items()}
    reinforce_loss(**leaves, response_BT=torch.ones(1, 2, dtype=torch.bool), beta=0.1).sum().backward()
    assert leaves["return_BT"].grad is None
    torch.testing.assert_close(leaves["logp_BT"].grad, torch.tensor([[-1.5, -1.0]]))
    torch.testing.assert_close(leaves["kl_BT"].grad, torch.tensor([[0.05, 0.05]]))


def formula(weight, penalty=lambda policy, teacher: kl(policy.logps, teacher.logps)) -> Formula:
    """`weight` of the rewards (n,) of a response; the mean over its tokens."""

    def losses(said: dict[str, list[Response]]) -> list[Tensor]:
        found = []
        for policy, teacher, reverse in zip(*(said[role] for role in OBJECTIVE.needs), strict=True):
            reward = (0.1 * (teacher.logp - reverse.logp)).detach()
            found.append(-(weight(reward) * policy.logp - 0.08 * penalty(policy, teacher)).mean())
        return found

    return losses


def to_go(reward: Tensor) -> Tensor:
    return torch.stack([reward[t:].sum() for t in range(len(reward))])


def folded(said: dict[str, list[Response]]) -> list[Tensor]:
    """The KL of a token as part of its reward."""
    found = []
    for policy, teacher, reverse in zip(*(said[role] for role in OBJECTIVE.needs), strict=True):
        net = 0.1 * (teacher.logp - reverse.logp) - 0.08 * kl(policy.logps, teacher.logps)
        found.append(-(to_go(net).detach() * policy.logp).mean())
    return found


RIGHT = formula(to_go)
WRONG = {
    "the total return": formula(lambda r: r.sum().expand_as(r)),
    "the immediate reward": formula(lambda r: r),
    "past rewards": formula(lambda r: r.cumsum(0)),
    "without the token's own": formula(lambda r: to_go(r) - r),
    "returns divided by the length": formula(lambda r: to_go(r) / len(r)),
    "discounted": formula(lambda r: to_go(r * 0.95 ** torch.arange(len(r))) / 0.95 ** torch.arange(len(r))),
    "forward KL": formula(to_go, lambda policy, teacher: kl(teacher.logps, policy.logps)),
    "sampled KL": formula(to_go, lambda policy, teacher: policy.logp - teacher.logp),
    "KL one position late": formula(to_go, lambda policy, teacher: kl(policy.after, teacher.after)),
    "KL without gradient": formula(to_go, lambda policy, teacher: kl(policy.logps, teacher.logps).detach()),
    "KL in the return": folded,
}


def test_the_formula_written_out_again_agrees():
    assert max(distances(OBJECTIVE, RIGHT, BATCH, LOGITS)) < 1e-9


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_would_be_seen(fault):
    assert max(distances(OBJECTIVE, WRONG[fault], BATCH, LOGITS)) > 1e-4


def test_for_responses_of_one_token_it_is_on_average_aligndistil_with_a_constant_weight():
    mdp, generator = TabularMDP(vocab=5, horizon=1), torch.Generator().manual_seed(1)
    policy, dpo, reverse = (mdp.table(generator) for _ in range(3))
    frozen = {Role.TEACHER: dpo, Role.REVERSE_TEACHER: reverse}
    distilled = AlignDistil(weight="constant", beta=0.08, beta0=0.1)
    torch.testing.assert_close(
        mdp.expected_gradient(OBJECTIVE, policy, frozen), mdp.expected_gradient(distilled, policy, frozen)
    )


def test_a_policy_that_is_the_teacher_has_no_divergence():
    loss = plain_loss(OBJECTIVE, BATCH, {**LOGITS, Role.POLICY: LOGITS[Role.TEACHER]})
    for name in ("kl/policy_teacher", "kl/policy_teacher_token", "kl/policy_teacher_sampled"):
        assert float(loss.metrics[name].total) == pytest.approx(0, abs=1e-12)


def test_it_samples_its_responses_and_reads_the_reverse_teacher_at_the_tokens_only():
    assert OBJECTIVE.on_policy is OnPolicy.ALWAYS
    assert OBJECTIVE.needs == {
        Role.POLICY: Need.DISTRIBUTION,
        Role.TEACHER: Need.DISTRIBUTION,
        Role.REVERSE_TEACHER: Need.LOGP,
    }
