"""A stage of the quickstart as the command trains it, where a card is at hand: the same in bfloat16 as in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

FEW_ROWS = ("data.train.limit=128", "data.eval.limit=32", "evaluation.every=null", "evaluation.samples=8")


@pytest.mark.gpu
def test_on_a_gpu_the_first_stage_ends_the_same_in_bfloat16_as_in_float32(
    command_line: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    last = {}
    for dtype in ("float32", "bfloat16"):
        settings = (f"output_dir={tmp_path / dtype}", f"model.dtype={dtype}", *FEW_ROWS)
        overrides = [part for one in settings for part in ("--set", one)]
        code, _, said = command_line("train", "quickstart", "--stage", "dpo", *overrides)
        assert code == 0, said
        lines = [json.loads(line) for line in (tmp_path / dtype / "dpo/metrics.jsonl").read_text().splitlines()]
        last[dtype] = next(line for line in reversed(lines) if line["split"] == "eval")
    assert abs(last["float32"]["loss"] - math.log(2)) > 1e-4  # where it began
    assert last["bfloat16"]["loss"] == pytest.approx(last["float32"]["loss"], rel=0.02)
