"""`aligndistil env`: versions and devices, for a bug report."""

from __future__ import annotations

from typing import Any

import torch

from aligndistil.run_folder import Environment


def environment_report() -> dict[str, Any]:
    """Versions, git revision and devices; see `Environment`."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = Environment.collect(devices=devices).model_dump(mode="json")
    return report
