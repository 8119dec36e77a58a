"""The most memory that this process has held: allocated by torch on a GPU, resident on a CPU."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak_memory() -> float:
    """Start measuring anew, so that a stage does not report an earlier one's peak; the GiB that are held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # "reset the peak resident set size", man 5 proc
    return peak_memory_gib()


def peak_memory_gib() -> float:
    """The peak since then, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if found is not None:
            return int(found.group(1)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
