"""Which losses have a derivative that is known before the models are read, and that it is theirs."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.direction import loss_direction
from aligndistil.maths import mean_of
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Loss, Need, Objective, Role, TokenChunk
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.kto import KTO
from aligndistil.objectives.sft import SFT
from aligndistil.objectives.tdpo import TDPO
from support.micro_batches import given, ragged_batch
from support.objectives import EVERY_OBJECTIVE, named

ROWS = collate([Row([5], [6, 1]), Row([5, 7], [1])], DataKind.RESPONSES, pad_id=0)
PAIR = collate([Row([5], [6, 1]), Row([5], [1])], DataKind.PAIRS, pad_id=0)
ALWAYS = {"sft", "aligndistil"}
"""Losses that are linear in a term; those of one example are all functions of one weighted sum, but for these."""
NEVER = {"ppo", "rto", "reward_model", "reinforce"}


def found_in(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """What a preparation finds, of models that say something random."""
    if objective.is_scalar:
        return {}
    logits = torch.randn(*batch.ids_BT.shape, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return given(objective, batch, logits)


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("objective", EVERY_OBJECTIVE, ids=named)
def test_the_derivative_is_known_of_linear_losses_and_of_single_examples(objective: Objective, examples: int) -> None:
    batch = ragged_batch(objective.data, examples, 11)
    known = loss_direction(objective, batch, found_in(objective, batch))
    expected = objective.name in ALWAYS or (examples == 1 and objective.name not in NEVER)
    assert (known is not None) == expected
    if known is not None:
        assert set(known) <= set(objective.terms)
        assert all(value[~batch.response_BT].abs().max() == 0 for value in known.values())


def scaled(objective: Objective, batch: Batch) -> dict[str, list[list[float]]]:
    """So that the first number which is not 0 is 1."""
    known = loss_direction(objective, batch, {})
    assert known is not None
    first = next(iter(known.values()))
    return {name: (value / first[first != 0][0]).tolist() for name, value in known.items()}


def test_derivatives_by_hand_up_to_a_factor() -> None:
    # Every response counts the same, whatever its length: the token of the short one counts as two of the long one.
    assert scaled(AlignDistil(), ROWS) == {"weighted_kl": [[0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]}
    assert scaled(SFT(), ROWS) == {"logp": [[0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]}
    signs = [[0.0, 1.0, 1.0], [0.0, -1.0, 0.0]]
    assert scaled(DPO(), PAIR) == {"logp": signs, "ref_logp": [[-x for x in row] for row in signs]}
    # TDPO2 holds the chosen divergence fixed, and gives the rejected one minus alpha.
    tdpo = scaled(TDPO(alpha=0.5), PAIR)
    assert tdpo["logp"] == signs
    assert tdpo["kl"] == [[0.0, 0.0, 0.0], [0.0, pytest.approx(-0.5), 0.0]]


def test_the_generator_of_the_run_is_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loss_direction(DPO(), PAIR, {})
    assert torch.equal(torch.rand(3), expected)


def test_means_that_were_prepared_are_part_of_the_loss() -> None:
    one = collate([Row([5], [6, 1])], DataKind.UNPAIRED, pad_id=0)
    assert loss_direction(KTO(), one, {"kl/mismatched": torch.tensor(0.3, dtype=torch.float64)}) is not None


class Hinge(Objective):
    """Flat beyond a margin: at a random point it may say nothing at all."""

    data = DataKind.RESPONSES
    paper = ""
    name: str = "hinge"
    margin: float = 1e3

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: TokenChunk) -> dict[str, Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def loss(self, batch: Batch, terms: Mapping[str, Tensor]) -> Loss:
        losses = torch.relu(-self.margin - (terms["logp"] * batch.response_BT).sum(-1))
        return Loss(losses, {"loss/hinge": mean_of(losses)})


def test_a_loss_that_says_nothing_at_random_points_has_no_known_derivative() -> None:
    assert loss_direction(Hinge(), ROWS, {}) is None
    assert loss_direction(Hinge(margin=-1e3), ROWS, {}) is not None
