"""A run may also stop between stages."""

from __future__ import annotations

import pytest
import torch

from aligndistil.commands import train as pipeline
from aligndistil.engine.processes import Processes
from aligndistil.errors import EXIT_SIGTERM, Interrupted
from aligndistil.stop import StopSignal

ALONE = Processes(0, 1, torch.device("cpu"))


def test_a_run_may_also_stop_between_stages() -> None:
    stop = StopSignal()
    pipeline._stop_between_stages(ALONE, stop, "dpo")
    stop.requested = True
    with pytest.raises(Interrupted, match="stopped after stage dpo, which is finished") as caught:
        pipeline._stop_between_stages(ALONE, stop, "dpo")
    assert caught.value.exit_code == EXIT_SIGTERM
