"""How examples are cut into micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndistil.training.micro_batches import MicroBatches

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths=lengths, size=st.integers(1, 8))
def test_rows_of_similar_length_stand_together_and_every_one_once(lengths: list[int], size: int) -> None:
    cut = MicroBatches(size).cut(lengths)
    assert sorted(place for part in cut for place in part) == list(range(len(lengths)))
    assert [lengths[place] for part in cut for place in part] == sorted(lengths, reverse=True)
    assert [len(part) for part in cut[:-1]] == [size] * (len(cut) - 1)


@given(lengths=lengths, tokens=st.integers(1, 200), rows=st.integers(1, 2))
def test_a_budget_of_tokens_counts_padding_and_leaves_a_longer_example_alone(
    lengths: list[int], tokens: int, rows: int
) -> None:
    cut = MicroBatches(1, tokens).cut(lengths, rows)
    for part, following in zip(cut, [*cut[1:], []], strict=True):
        longest = max(lengths[place] for place in part) * rows
        assert len(part) * longest <= tokens or len(part) == 1
        assert not following or (len(part) + 1) * longest > tokens, "one more had had a place"
    assert sorted(place for part in cut for place in part) == list(range(len(lengths)))


@given(lengths=lengths, tokens=st.integers(1, 200), world=st.integers(1, 4), least=st.integers(1, 6))
def test_every_process_has_as_many_micro_batches(lengths: list[int], tokens: int, world: int, least: int) -> None:
    try:
        cut = MicroBatches(1, tokens).cut(lengths, multiple=world, least=least)
    except ValueError:
        assert len(lengths) < max(least, -(-len(lengths) // world) * world)
        return
    assert len(cut) >= least
    assert len(cut) == least or len(cut) % world == 0
    assert sorted(place for part in cut for place in part) == list(range(len(lengths)))
    assert all(cut)


def test_a_step_that_is_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 examples do not make 4 micro-batches"):
        MicroBatches(1).cut([5, 5, 5], multiple=4)
