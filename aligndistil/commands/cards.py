"""The card that a plan is for: the one that is there, or one that is named by its memory and its rate."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from aligndistil.training.memory import GIB, Device

RATES = {
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "A10G": 70,
    "A30": 165,
    "A40": 150,
    "RTX A6000": 155,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "RTX 6000 Ada": 364,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H20": 148,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "MI250X": 383,
    "MI300X": 1307,
}
"""Peak TFLOP/s of dense bfloat16 products, by a part of the name that torch gives a card.

From the makers' data sheets: NVIDIA's of each card (where one gives the rate of sparse matrices, half of it) and its
architecture papers of Ampere, Ada and Blackwell for the GeForce ones; AMD's of the Instinct accelerators.
"""
SHARE_OF_PEAK = 0.4
"""Of a card's peak that training a language model usually reaches."""
USABLE = 0.9
"""Share of a card's memory that a stage may fill: the rest is the CUDA context, workspaces and fragmentation."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a stage's processes compute on."""

    device: Device
    memory: float | None
    """GiB of one card, or of the machine where there is none; None where it is not known."""
    tflops: float | None
    """Peak of one card in bfloat16."""

    def fits(self, gib: float, processes: int) -> str | None:
        """`yes`, `tight` or `no` for so many GiB a process; the processes of a CPU share its memory."""
        if self.memory is None:
            return None
        taken = gib * (processes if self.device == "cpu" else 1)
        return "yes" if taken <= USABLE * self.memory else "tight" if taken <= self.memory else "no"

    def hours(self, operations: float, processes: int) -> float | None:
        if self.tflops is None:
            return None
        return operations / (SHARE_OF_PEAK * self.tflops * 1e12 * processes) / 3600


def card_of(memory: float | None, tflops: float | None) -> Card:
    """The card of `--gpu-memory` and `--gpu-tflops`; what is not given is that of the card that is there."""
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0)
        return Card("cuda", memory or there.total_memory / GIB, tflops or rate_of(there.name))
    if memory is not None or tflops is not None:
        return Card("cuda", memory, tflops)
    return Card("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, None)


def rate_of(name: str) -> float | None:
    """Peak TFLOP/s of a card by the name that torch gives it; None for one that is not known."""
    words = f" {name.replace('-', ' ')} "
    known = [part for part in RATES if f" {part} " in words]
    return float(RATES[max(known, key=len)]) if known else None
