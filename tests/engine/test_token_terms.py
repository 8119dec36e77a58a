"""The chunked terms against whole logits: the same loss, the same gradients, and no large tensor on the way."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aligndistil.batch import DataKind
from aligndistil.engine.direction import loss_direction
from aligndistil.engine.token_terms import FrozenRole, Plan, chunk_size, token_terms
from aligndistil.objectives import registry
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Loss, Objective, Role
from aligndistil.objectives.dpo import DPO
from aligndistil.objectives.kto import KTO
from aligndistil.objectives.sft import SFT
from support.objectives import EVERY_OBJECTIVE, named
from support.projections import HEADS, VOCAB, HiddenStates

OBJECTIVES = [objective for objective in EVERY_OBJECTIVE if not objective.is_scalar]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=named)


def direction(world: HiddenStates) -> dict[str, Tensor] | None:
    return loss_direction(world.objective, world.batch, world.found)


def gradients(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.per_example.mean(), leaves))


def assert_equal_to_plain(
    world: HiddenStates, chunk: int, known: Mapping[str, Tensor] | None, *, compiled: bool = False
) -> None:
    plain, chunked = world.plain(), world.chunked(chunk, known, compiled=compiled)
    torch.testing.assert_close(chunked.per_example, plain.per_example)
    assert chunked.metrics.keys() == plain.metrics.keys()
    for name, metric in chunked.metrics.items():
        torch.testing.assert_close(metric.total, plain.metrics[name].total, msg=name)
    for ours, theirs in zip(gradients(chunked, world.leaves), gradients(plain, world.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("head", HEADS)
@every_objective
def test_loss_and_gradients_equal_those_of_whole_logits(objective: Objective, head: str, chunk: int) -> None:
    world = HiddenStates(objective, **HEADS[head])
    assert_equal_to_plain(world, chunk, direction(world))


@pytest.mark.parametrize("head", ["plain", "all", "tempered"])
@pytest.mark.parametrize("room", [0, 2 * 4 * 7 * VOCAB, 10**6])  # for no chunk's softmax, those of two, and of all
@every_objective
def test_the_gradient_is_the_same_when_it_is_not_known_beforehand(
    objective: Objective, room: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligndistil.engine.token_terms.KEPT_BYTES", room)
    assert_equal_to_plain(HiddenStates(objective, **HEADS[head]), 7, None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("objective", "head"),
    [(AlignDistil(), "all"), (DPO(), "plain")]
    + [pytest.param(one, head, marks=pytest.mark.slow) for one in OBJECTIVES for head in HEADS],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_compiled_terms_are_those_of_whole_logits(objective: Objective, head: str) -> None:
    for examples in (3, 5):  # chunks of other sizes go through the same kernel
        world = HiddenStates(objective, examples=examples, **HEADS[head])
        for known in (direction(world), None):
            assert_equal_to_plain(world, 7, known, compiled=True)


@pytest.mark.parametrize("objective", [DPO(), DPO(label_smoothing=0.2), KTO()], ids=named)
def test_the_gradient_of_a_single_example_is_taken_in_the_forward_pass(objective: Objective) -> None:
    world = HiddenStates(objective, examples=1)
    known = direction(world)
    assert known is not None
    assert_equal_to_plain(world, 3, known)


def test_only_what_needs_a_gradient_gets_one() -> None:
    for frozen_head, frozen_body in itertools.product([True, False], repeat=2):
        world = HiddenStates(AlignDistil(), bias=True)
        plain = gradients(world.plain(), world.leaves)
        wanted = [not frozen_body, not frozen_head, not frozen_head]
        for leaf, want in zip(world.leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        loss = world.chunked(4, direction(world)).per_example.mean()
        if not any(wanted):
            assert not loss.requires_grad
            continue
        loss.backward()
        for leaf, want, expected in zip(world.leaves, wanted, plain, strict=True):
            assert (leaf.grad is not None) == want
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradients_of_micro_batches_add_up_in_grad() -> None:
    world = HiddenStates(AlignDistil())
    expected = gradients(world.plain(), world.leaves)
    for _ in range(3):
        world.chunked(4, direction(world)).per_example.mean().backward()
    for leaf, once in zip(world.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * once, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("known", [True, False])
def test_a_second_backward_pass_is_refused(known: bool) -> None:
    world = HiddenStates(AlignDistil())
    loss = world.chunked(4, direction(world) if known else None).per_example.mean()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_derivative_that_turns_out_to_be_another_is_not_used() -> None:
    """The forward pass has taken the gradient in a wrong direction; the backward pass notices, and takes it again."""
    for objective, examples in ((SFT(), 3), (DPO(), 1)):
        world = HiddenStates(objective, examples=examples)
        known = direction(world)
        assert known is not None
        # Every token weighs the same, where each row is averaged by its own length; and a term is forgotten.
        all_equal = {name: world.batch.response_BT.double() for name in known}
        forgotten = {name: value for name, value in known.items() if name != "ref_logp"}
        forgotten |= {name: 0.5 * world.batch.response_BT.double() for name in ("logp",)}
        for wrong in (all_equal, forgotten):
            assert_equal_to_plain(world, 4, wrong)


def test_a_factor_on_the_derivative_does_not_matter() -> None:
    world = HiddenStates(SFT())
    known = direction(world)
    assert known is not None
    assert_equal_to_plain(world, 4, {name: -2 * value for name, value in known.items()})


def test_a_loss_of_zero_weight_gives_a_gradient_of_zero() -> None:
    world = HiddenStates(AlignDistil())
    loss = world.chunked(4, direction(world))
    for gradient in torch.autograd.grad(loss.per_example.sum() * 0, world.leaves):
        assert torch.all(gradient == 0)


@every_objective
def test_bfloat16_states_and_weights_give_the_loss_of_the_same_numbers_in_float32(objective: Objective) -> None:
    narrow, wide = (
        HiddenStates(objective, hidden=64, dtype=torch.bfloat16),
        HiddenStates(objective, hidden=64, dtype=torch.float32),
    )
    with torch.no_grad():
        for role in narrow.heads:
            wide.hidden[role].copy_(narrow.hidden[role])
            wide.heads[role].linear.weight.copy_(narrow.heads[role].linear.weight)
    wide.found = narrow.found
    known = direction(narrow)
    of_narrow, of_wide = narrow.chunked(7, known), wide.chunked(7, known)
    assert of_narrow.per_example.dtype == torch.float32
    # logits are never rounded to bfloat16, so the losses are equal; the gradients end in bfloat16
    torch.testing.assert_close(of_narrow.per_example, of_wide.per_example, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(of_narrow, narrow.leaves), gradients(of_wide, wide.leaves), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("head", ["plain", "scaled"])
@every_objective
def test_nothing_larger_than_a_chunk_of_logits_or_the_weight_is_made(objective: Objective, head: str) -> None:
    chunk, vocab, hidden = 5, 101, 3
    world = HiddenStates(objective, vocab=vocab, hidden=hidden, examples=8, **HEADS[head])
    tokens = int(world.batch.response_BT.sum())
    assert tokens > 4 * chunk
    with Largest() as largest:
        world.chunked(chunk, direction(world)).per_example.mean().backward()
    assert largest.numel == chunk * vocab
    with Largest() as largest:
        world.plain().per_example.mean().backward()
    assert largest.numel >= tokens * vocab, "the plain formula makes what the chunked one must not"


@pytest.mark.parametrize(
    ("name", "examples", "room", "products"),
    [("sft", 3, 0, 3), ("aligndistil", 3, 0, 5), ("dpo", 1, 0, 4), ("dpo", 3, 10**6, 4), ("dpo", 3, 0, 5)],
)
def test_no_product_is_made_twice_that_can_be_made_once(
    name: str, examples: int, room: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each role's logits, and two for the gradients, of the hidden states and of the weight.

    Only the policy's logits for several pairs are needed again, once it is known how much each pair weighs, where there
    is no room for them until then.
    """
    monkeypatch.setattr("aligndistil.engine.token_terms.KEPT_BYTES", room)
    world = HiddenStates(registry()[name].example(), examples=examples)
    counted = {"mm": 0}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted["mm"] += "mm" in func.__name__
            return func(*args, **(kwargs or {}))

    with Products():
        world.chunked(10_000, direction(world)).per_example.mean().backward()
    assert counted["mm"] == products


def test_a_chunk_is_not_so_small_that_the_weight_is_read_for_a_few_tokens() -> None:
    assert chunk_size(49_152) == 31 * 2**20 // (4 * 49_152) == 165
    assert chunk_size(151_936) == 128
    assert chunk_size(96) > 80_000
    card = 80 * 10**9
    assert chunk_size(49_152, "cuda", card) == 4096
    assert chunk_size(151_936, "cuda", card) == 2048
    assert chunk_size(151_936, "cuda", card // 4) == 1024


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "loss", "gradient"), [("bfloat16", 1e-3, 2e-2), ("float32", 1e-5, 1e-4)])
@pytest.mark.parametrize("head", ["plain", "all"])
@every_objective
def test_on_a_gpu_loss_and_gradients_are_those_of_whole_logits_in_float64(
    objective: Objective, head: str, dtype: str, loss: float, gradient: float
) -> None:
    there = HiddenStates(objective, hidden=64, dtype=getattr(torch, dtype), device="cuda", **HEADS[head])
    here = HiddenStates(objective, hidden=64, **HEADS[head])
    with torch.no_grad():
        for role in there.heads:
            here.hidden[role].copy_(there.hidden[role])
            for ours, theirs in zip(
                here.heads[role].linear.parameters(), there.heads[role].linear.parameters(), strict=True
            ):
                ours.copy_(theirs)
    here.found = {name: value.cpu().double() for name, value in there.found.items()}
    on_gpu, exact = there.chunked(7, direction(there)), here.plain()
    torch.testing.assert_close(on_gpu.per_example.cpu().double(), exact.per_example.double(), rtol=loss, atol=loss)
    for ours, theirs in zip(gradients(on_gpu, there.leaves), gradients(exact, here.leaves), strict=True):
        assert (ours.cpu().double() - theirs).norm() < gradient * theirs.norm()


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow_with_the_number_of_tokens() -> None:
    vocab, hidden, chunk = 32_768, 64, 128
    peaks = []
    for examples in (32, 512):
        world = HiddenStates(
            AlignDistil(), vocab=vocab, hidden=hidden, examples=examples, dtype=torch.bfloat16, device="cuda"
        )
        known = direction(world)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        world.chunked(chunk, known).per_example.mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + chunk * vocab * 4


def test_pairs_and_responses_are_both_among_the_objectives() -> None:
    assert {DataKind.PAIRS, DataKind.RESPONSES} <= {objective.data for objective in OBJECTIVES}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(value: float) -> None:
    """So that the loop can refuse it with a sentence."""
    world = HiddenStates(AlignDistil())
    loss = world.chunked(4, direction(world)).per_example.sum() * value
    for gradient in torch.autograd.grad(loss, world.leaves):
        assert not torch.isfinite(gradient).all()


def test_nothing_is_kept_where_no_backward_pass_follows() -> None:
    """A trainable head asks for a gradient also where gradients are switched off."""
    world = HiddenStates(DPO(), examples=3)
    mask = world.batch.response_BT
    states = {role: hidden[:, :-1][mask[:, 1:]] for role, hidden in world.hidden.items()}
    frozen = {role: FrozenRole(states[role], world.heads[role]) for role in states if role != Role.POLICY}
    for learns in (False, True):
        plan = Plan(world.objective, world.heads[Role.POLICY], world.batch.ids_BT[mask], frozen, 7, None)
        with torch.set_grad_enabled(learns):
            token_terms(plan, states[Role.POLICY])
        assert bool(plan.softmax) == learns
