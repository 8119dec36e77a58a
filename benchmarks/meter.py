"""Time and peak memory of a piece of work: the allocator's on CUDA, the process's own on a CPU (Linux)."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from pathlib import Path

import torch


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def start_of_peak(device: str) -> int:
    """Bytes in use now; `peak` counts from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Highest bytes in use since `start_of_peak`: the allocator's on CUDA, the resident set's on a CPU (Linux)."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def check_the_meter(device: str) -> None:
    """A tensor of 256 MiB, made and freed, must read as 256 MiB, after a larger one as well."""
    for mib in (512, 256):
        before = start_of_peak(device)
        torch.ones(mib * 2**18, device=device)
        measured = (peak(device) - before) / 2**20
        assert abs(measured - mib) < 0.05 * mib, f"{mib} MiB read as {measured:.0f} MiB"


def machine(device: str, dtype: str) -> str:
    """Where, and with what, something was measured."""
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {dtype}"
    else:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.machine()
        where = f"{name}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, {dtype}"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"
