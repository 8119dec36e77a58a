"""Scalar heads, what is found before a step, and two trained models: at every ZeRO stage the numbers of plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rounds import CASES, case_of, engine_of, engine_rounds, folders_of, plain_rounds, whole_weights

from aligndistil.engine.processes import Processes

ModelFolder = Callable[..., str]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rounds_at_every_zero_stage_are_those_of_plain_torch(
    stage: int, name: str, model_folder: ModelFolder, processes: Processes
) -> None:
    case = case_of(name, folders_of(model_folder))
    expected, weights = plain_rounds(case)
    engine = engine_of(case, processes, stage)
    lines = engine_rounds(engine, case)
    assert len(lines) == case.steps == len(expected)
    for ours, theirs in zip(lines, expected, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, abs=2e-5)
    norms = {key for key in expected[0] if key.endswith("grad_norm")}
    assert all(max(line[norm] for line in expected) > case.max_norm for norm in norms), "nothing was clipped"
    with whole_weights(engine) as trained:
        assert set(trained) == set(weights)
        for (model, parameters), rate in zip(weights.items(), case.rates[: len(weights)], strict=True):
            for key, value in parameters.items():
                # A gradient of almost nothing moves a weight by the whole rate, in a direction that rounding decides.
                far = (trained[model][key] - value).abs() > 0.02 * rate
                assert float(far.float().mean()) < 0.002, f"{model}: {key}"
    engine.close()


@pytest.mark.parametrize(("name", "stage"), [("reward_model", 2), ("ppo", 0), ("ppo", 2)])
def test_rounds_in_bfloat16_stay_close_to_float32(
    name: str, stage: int, model_folder: ModelFolder, processes: Processes
) -> None:
    """The first step: later ones go other ways."""
    case = case_of(name, folders_of(model_folder))
    expected, _ = plain_rounds(case)
    engine = engine_of(case, processes, stage, model={"dtype": "bfloat16"})
    lines = engine_rounds(engine, case)
    assert {value.dtype for value in engine.state_dict().values()} == {torch.bfloat16}
    engine.close()
    for key in ("loss", "loss/value", "grad_norm", "critic/grad_norm"):
        if key in expected[0]:
            assert lines[0][key] == pytest.approx(expected[0][key], rel=0.1, abs=0.02), key
    assert all(math.isfinite(value) for line in lines for value in line.values())
