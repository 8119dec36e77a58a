"""The sampler's promises: whole epochs, exact resume, and the same micro-batches on any number of processes."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndistil.data import Sampler

sizes, batches, seeds = st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**31)


@given(n=sizes, batch_size=batches, seed=seeds)
def test_each_epoch_visits_each_example_once(n, batch_size, seed):
    sampler = Sampler(n, batch_size, seed)
    stream = list(chain.from_iterable(sampler.batch(step) for step in range(3 * n // batch_size + 1)))
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=sizes, batch_size=batches, seed=seeds, step=st.integers(0, 200))
def test_a_step_is_the_same_whatever_was_asked_before(n, batch_size, seed, step):
    walked = Sampler(n, batch_size, seed)
    for earlier in range(min(step, 10)):
        walked.batch(earlier)
    assert walked.batch(step) == Sampler(n, batch_size, seed).batch(step)


def test_epochs_differ_and_seeds_differ():
    sampler = Sampler(50, 50, 0)
    assert sampler.batch(0) != sampler.batch(1)
    assert sampler.batch(0) != Sampler(50, 50, 1).batch(0)


def test_a_sampler_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs examples"):
        Sampler(0, 6, 0)


@pytest.mark.parametrize(
    ("n", "batch_size", "epochs", "steps"), [(10, 5, 1, 2), (10, 4, 1, 3), (10, 4, 2, 5), (30, 1, 0.1, 3), (3, 8, 1, 1)]
)
def test_steps_cover_the_epochs(n, batch_size, epochs, steps):
    sampler = Sampler(n, batch_size, 0)
    assert sampler.steps_for(epochs) == steps
    assert sampler.epoch(steps) >= epochs
