"""Which examples a step sees: a pure function of (seed, number of examples, step), so that a resumed run is exact."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """An endless stream of shuffled epochs, cut into batches. Steps count from 0; a batch may cross epochs.

    Example k of the stream is entry k % n of the permutation of epoch k // n; step s takes examples
    s * batch_size ... (s + 1) * batch_size - 1. Nothing depends on the number of processes.

    Raises ValueError when n or batch_size is not positive.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"a sampler needs examples and a batch size, not {n} and {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed

    def batch(self, step: int) -> list[int]:
        """The example indices of a step, over all processes."""
        places = (divmod(position, self.n) for position in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [int(_permutation(self.seed, epoch, self.n)[place]) for epoch, place in places]

    def epoch(self, step: int) -> float:
        """Epochs seen before this step."""
        return step * self.batch_size / self.n

    def steps_for(self, epochs: float) -> int:
        """Steps after which every example was seen `epochs` times: rounded up, the next epoch fills the last batch."""
        # Rounded before it is raised: 0.1 * 30 must be 3 examples, not 4.
        return max(1, math.ceil(round(epochs * self.n / self.batch_size, 9)))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)
