"""A stage's peak memory is its own, not that of a stage before it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from aligndistil.engine.memory import forget_peak_memory, peak_memory_gib


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="of resident memory on Linux")
def test_an_earlier_peak_is_forgotten() -> None:
    forget_peak_memory()
    before = peak_memory_gib()
    large = np.ones(2**27)  # one GiB
    assert peak_memory_gib() > before + 0.9
    del large
    assert peak_memory_gib() > before + 0.9
    forget_peak_memory()
    assert peak_memory_gib() < before + 0.5
