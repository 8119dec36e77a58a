"""How well rewards rank the same pairs: accuracies, and paired intervals of their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndistil.report.results import RewardResult

NORMAL_95 = 1.959964
"""Standard errors on either side of a mean, 95 % of a normal distribution between."""
SPLITS = {"train": "training pairs", "eval": "held-out pairs"}


class Estimate(NamedTuple):
    """A mean over pairs and its standard error."""

    mean: float
    error: float
    pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation."""
        return self.mean - NORMAL_95 * self.error, self.mean + NORMAL_95 * self.error


def accuracy(reward: RewardResult, split: str) -> Estimate | None:
    """The share of pairs ranked right; None where the reward was not asked about the split."""
    shares = _shares(reward, split)
    return None if shares is None else _estimate(shares)


def difference(reward: RewardResult, other: RewardResult, split: str) -> Estimate | None:
    """The accuracy of `reward` less that of `other`, paired: its error is that of the mean of the pairs' differences.

    None where they were not asked about the same pairs.
    Far smaller than that of two unrelated accuracies, since both rewards are right and wrong about the same pairs.
    """
    ours, theirs = _shares(reward, split), _shares(other, split)
    if ours is None or theirs is None or len(ours) != len(theirs) or reward.measured_on != other.measured_on:
        return None
    return _estimate(ours - theirs)


def compared_with(rewards: Sequence[RewardResult]) -> RewardResult:
    """The one that the others are compared with: the first contrastive reward, or else the first."""
    return next((reward for reward in rewards if reward.kind == "contrastive"), rewards[0])


def _shares(reward: RewardResult, split: str) -> NDArray[np.float64] | None:
    """Of each pair, the share of the seeds that rank it right."""
    seeds = reward.right.get(split)
    if not seeds or not seeds[0]:
        return None
    shares: NDArray[np.float64] = np.array([[bit == "1" for bit in bits] for bits in seeds], dtype=np.float64).mean(0)
    return shares


def _estimate(values: NDArray[np.float64]) -> Estimate:
    count = len(values)
    spread = float(values.std(ddof=1)) if count > 1 else math.inf
    return Estimate(float(values.mean()), spread / math.sqrt(count), count)
