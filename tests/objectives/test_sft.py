import torch

from aligndistil.batch import DataKind, Row, collate
from aligndistil.objectives.base import Role
from aligndistil.objectives.sft import SFT
from support.micro_batches import ragged_batch, random_logits
from support.plain_formula import gradient_of, plain_loss


def test_the_loss_is_the_mean_over_the_tokens_of_each_response() -> None:
    batch = collate([Row([5], [6, 1]), Row([5, 7], [1])], DataKind.RESPONSES, pad_id=0)
    logp_BT = torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, -4.0]])
    loss = SFT().loss(batch, {"logp": logp_BT})
    # (1 + 2) / 2 = 1.5 and 4 / 1 = 4: the mean over responses is 2.75, that over tokens would be 7 / 3
    assert loss.per_example.tolist() == [1.5, 4.0]
    total, count = loss.metrics["logps/token_mean"]
    assert (float(total), float(count)) == (-5.5, 2.0)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = {Role.POLICY: torch.zeros(*batch.ids_BT.shape, 11)}
    torch.testing.assert_close(
        plain_loss(SFT(), batch, logits).per_example, torch.full((3,), torch.tensor(11.0).log().item())
    )


def test_training_raises_the_tokens_of_the_response_and_lowers_the_others() -> None:
    batch = ragged_batch(DataKind.RESPONSES)
    logits = random_logits(SFT(), batch)
    gradient = gradient_of(plain_loss(SFT(), batch, logits), logits[Role.POLICY])
    where = batch.response_BT[:, 1:]
    predictions, tokens = gradient[:, :-1][where], batch.ids_BT[:, 1:][where]
    own = predictions.gather(-1, tokens[:, None])
    assert (own < 0).all()
    assert ((predictions > 0).sum(-1) == 10).all()
