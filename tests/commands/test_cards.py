"""The card of a plan: what fits it, and how fast it is."""

import pytest
import torch

from aligndistil.commands.cards import Card, card_of, rate_of


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("AMD Instinct MI300X", 1307),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_card_is_known_by_the_name_that_torch_gives_it(name, rate):
    assert rate_of(name) == rate


@pytest.mark.parametrize(("gib", "said"), [(71.9, "yes"), (72.1, "tight"), (80.0, "tight"), (80.1, "no")])
def test_a_tenth_of_a_card_is_left_for_what_is_not_counted(gib, said):
    assert Card("cuda", 80.0, None).fits(gib, processes=8) == said


def test_the_processes_of_a_cpu_share_its_memory():
    assert [Card("cpu", 16.0, None).fits(4.0, processes) for processes in (1, 3, 4, 8)] == ["yes", "yes", "tight", "no"]


def test_where_the_memory_is_not_known_nothing_is_said_of_it():
    assert Card("cuda", None, 312.0).fits(1e6, 1) is None


def test_hours_are_operations_over_forty_percent_of_the_peak_of_all_cards():
    assert Card("cuda", None, 100.0).hours(8 * 3600 * 40e12, processes=4) == pytest.approx(2.0)
    assert Card("cuda", 80.0, None).hours(1e18, 1) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_without_a_card_the_machine_is_planned_for_unless_a_card_is_named():
    here, named = card_of(None, None), card_of(80.0, None)
    assert here.device == "cpu"
    assert here.memory > 0
    assert named == Card("cuda", 80.0, None)
    assert card_of(None, 312.0) == Card("cuda", None, 312.0)
