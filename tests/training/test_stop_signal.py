"""SIGTERM is a request that is honoured when a step, or a stage, is done."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from aligndistil.commands import train as pipeline
from aligndistil.engine.processes import Processes
from aligndistil.errors import EXIT_SIGTERM, Interrupted
from aligndistil.training import StopSignal

ALONE = Processes(0, 1, torch.device("cpu"))


def test_a_signal_is_noted_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_may_also_stop_between_stages() -> None:
    stop = StopSignal()
    pipeline._stop_between_stages(ALONE, stop, "dpo")
    stop.requested = True
    with pytest.raises(Interrupted, match="stopped after stage dpo, which is finished") as caught:
        pipeline._stop_between_stages(ALONE, stop, "dpo")
    assert caught.value.exit_code == EXIT_SIGTERM
