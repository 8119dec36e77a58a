"""What the page says of a token is what the objective and the models say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.policy import FrozenModel, Policy
from aligndistil.objectives import registry
from aligndistil.objectives.base import Loss, Need, Objective, Role, TokenChunk
from aligndistil.token_view import TARGET, TokenValues, Viewer
from aligndistil.token_view.values import loss_by_token
from support.models import build_model

ROW = Row([5, 6, 7], [20, 31, 20, 44, 1])
TOP = 4
BARRED = {name for name, cls in registry().items() if cls.example().is_scalar}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The policy, and three models for the frozen roles."""
    roles = (Role.POLICY, Role.TEACHER, Role.REVERSE_TEACHER, Role.REFERENCE)
    return {role: build_model(seed=seed) for seed, role in enumerate(roles)}


def objective(name: str, **fields: Any) -> Objective:
    return registry()[name].model_validate({"name": name, **fields})


def frozen_of(models: Mapping[str, Any], needs: Mapping[str, Need]) -> dict[str, Any]:
    return {role: models[role] for role, need in needs.items() if role != Role.POLICY and not need.is_scalar}


def view(models: Mapping[str, Any], watched: Objective, row: Row = ROW) -> TokenValues:
    return Viewer(watched, models[Role.POLICY], frozen_of(models, watched.needs), vocab=96, top=TOP).values(row)


@torch.no_grad()
def logps(model: Any, row: Row = ROW) -> torch.Tensor:
    """(n, V), from the whole model in one pass."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    return torch.log_softmax(model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1], -1)


def by_hand(models: Mapping[str, Any], watched: Objective) -> tuple[TokenChunk, dict[str, torch.Tensor]]:
    """The chunk of all response tokens from full logits, and the objective's terms of it."""
    ids = torch.tensor(ROW.response_ids)
    roles = [role for role, need in watched.needs.items() if not need.is_scalar]
    whole = {role: logps(models[role]) for role in roles}
    chunk = TokenChunk(ids, {role: table[torch.arange(5), ids] for role, table in whole.items()}, whole)
    return chunk, watched.token_terms(chunk)


VARIANTS = [
    ("aligndistil", {}),
    ("aligndistil", {"reward": "vanilla"}),
    ("aligndistil", {"weight": "constant", "beta": 0.08}),
    ("reinforce", {}),
    ("tdpo", {}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
@torch.no_grad()
def test_terms_equal_those_that_training_computes(models: dict[str, Any], name: str, fields: dict[str, Any]) -> None:
    watched = objective(name, **fields)
    batch = collate([ROW], DataKind.RESPONSES, 0)
    frozen = {role: FrozenModel(model, 96).read(batch) for role, model in frozen_of(models, watched.needs).items()}
    trained_BT = Policy(models[Role.POLICY], 96)(batch, watched, frozen)
    seen = view(models, watched).terms
    for term, values_BT in trained_BT.items():
        torch.testing.assert_close(torch.tensor(seen[term]), values_BT[batch.response_BT], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(registry().keys() - BARRED))
def test_every_objective_with_a_language_model_can_be_looked_at(models: dict[str, Any], name: str) -> None:
    watched = registry()[name].example()
    seen = view(models, watched)
    _, expected = by_hand(models, watched)
    assert expected.keys() <= seen.terms.keys()
    for term, values in expected.items():
        assert seen.terms[term] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-5)
    assert [*seen.probabilities][-1] == Role.POLICY


def test_a_reference_gives_the_log_ratio(models: dict[str, Any]) -> None:
    terms = view(models, objective("dpo")).terms
    differences = [a - b for a, b in zip(terms["logp"], terms["ref_logp"], strict=True)]
    assert terms["log_ratio"] == pytest.approx(differences, abs=1e-6)


def test_probabilities_are_those_of_the_models_and_the_target(models: dict[str, Any]) -> None:
    watched = objective("aligndistil", r=5)
    seen = view(models, watched)
    chunk, terms = by_hand(models, watched)
    step = terms["alpha"][:, None] * (chunk.logps[Role.TEACHER] - chunk.logps[Role.REVERSE_TEACHER])
    tables = {role.value: table for role, table in chunk.logps.items()}
    tables[TARGET] = torch.log_softmax(chunk.logps[Role.TEACHER] + step, -1)
    assert list(seen.probabilities) == ["teacher", "reverse_teacher", TARGET, "policy"]
    for name, rows in seen.probabilities.items():
        for t, row in enumerate(rows):
            assert row == pytest.approx(tables[name][t, seen.candidates[t]].exp().tolist(), abs=1e-5)


def test_candidates_hold_each_distributions_top_tokens_and_the_token_itself_once(models: dict[str, Any]) -> None:
    watched = objective("aligndistil")
    seen = view(models, watched)
    chunk, _ = by_hand(models, watched)
    for t, candidates in enumerate(seen.candidates):
        assert candidates[0] == ROW.response_ids[t]
        assert len(set(candidates)) == len(candidates)
        for table in chunk.logps.values():
            assert set(table[t].topk(TOP).indices.tolist()) <= set(candidates)


def test_the_rank_counts_the_tokens_that_are_likelier(models: dict[str, Any]) -> None:
    seen = view(models, objective("aligndistil"))
    table = logps(models[Role.TEACHER])
    expected = [int((table[t] > table[t, token]).sum()) for t, token in enumerate(ROW.response_ids)]
    assert seen.ranks["teacher"] == expected


def test_the_loss_of_the_tokens_adds_up_to_the_loss(models: dict[str, Any]) -> None:
    terms = view(models, objective("aligndistil")).terms
    loss = view(models, objective("aligndistil")).loss
    assert loss == pytest.approx([value / 5 for value in terms["weighted_kl"]], rel=1e-4)


def test_the_loss_of_a_likelihood_is_that_of_its_tokens(models: dict[str, Any]) -> None:
    seen = view(models, objective("sft"))
    assert seen.loss == pytest.approx([-value / 5 for value in seen.terms["logp"]], rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "simpo", "reinforce", "bandit"])
def test_a_preference_loss_or_a_policy_gradient_has_no_parts(models: dict[str, Any], name: str) -> None:
    assert view(models, objective(name)).loss is None


class Chunked(Policy):
    def __init__(self, model: Any, vocab: int) -> None:
        super().__init__(model, vocab, chunk_tokens=2)


def test_chunks_are_put_together_in_order(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = view(models, objective("aligndistil"))
    monkeypatch.setattr("aligndistil.token_view.values.Policy", Chunked)
    pieces = view(models, objective("aligndistil"))
    assert pieces.candidates == whole.candidates
    assert pieces.terms["tvd"] == pytest.approx(whole.terms["tvd"], abs=1e-6)


def test_a_policy_that_was_trained_at_a_temperature_is_seen_at_it(models: dict[str, Any]) -> None:
    watched, ids = objective("rto"), torch.tensor(ROW.response_ids)
    frozen = frozen_of(models, watched.needs)
    seen = Viewer(watched, models[Role.POLICY], frozen, vocab=96, top=TOP, temperature=0.5).values(ROW).terms
    own = {role: logps(models[role]) for role in (Role.POLICY, Role.REFERENCE, Role.TEACHER)}
    sharp = {role: (2 * table).log_softmax(-1) for role, table in own.items()}
    expected = {
        "logp": sharp[Role.POLICY],
        "kl_sampled": sharp[Role.POLICY] - sharp[Role.REFERENCE],
        "teacher_logratio": own[Role.TEACHER] - own[Role.REFERENCE],
    }
    for name, table in expected.items():
        assert seen[name] == pytest.approx(table[torch.arange(5), ids].tolist(), abs=1e-5), name


def test_padding_rows_of_the_output_matrix_are_cut(models: dict[str, Any]) -> None:
    padded = {**models, Role.POLICY: build_model(seed=0, vocab=128, tied=False)}
    assert all(token < 96 for row in view(padded, objective("aligndistil")).candidates for token in row)


def squared(inner: Objective) -> Objective:
    """An objective whose loss is the square of another's."""

    class Squared(type(inner)):  # type: ignore[misc]
        def loss(self, batch: Batch, terms: Mapping[str, torch.Tensor]) -> Loss:
            return Loss(super().loss(batch, terms).per_example ** 2, {})

    return Squared.model_validate(inner.model_dump())


def test_a_loss_that_is_no_sum_is_found_out(models: dict[str, Any]) -> None:
    watched = objective("aligndistil")
    batch = collate([ROW], DataKind.RESPONSES, 0)
    terms = {name: torch.rand(batch.ids_BT.shape) * batch.response_BT for name in view(models, watched).terms}
    assert loss_by_token(watched, batch, terms) is not None
    assert loss_by_token(squared(watched), batch, terms) is None


def test_rows_are_read_one_by_one_without_padding(models: dict[str, Any]) -> None:
    rows: Sequence[Row] = [ROW, Row([9], [30, 1])]
    viewer = Viewer(objective("sft"), models[Role.POLICY], {}, vocab=96, top=TOP)
    assert [len(viewer.values(row).candidates) for row in rows] == [5, 2]
