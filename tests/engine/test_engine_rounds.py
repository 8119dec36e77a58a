"""Scalar heads, what is found before a step, and two trained models: at every ZeRO stage the numbers of plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from aligndistil.engine.processes import Processes
from support.step_batches import CASES, case_of, engine_of, folders_of, train_engine, train_plainly, whole_weights

ModelFolder = Callable[..., str]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rounds_at_every_zero_stage_are_those_of_plain_torch(
    stage: int, name: str, model_folder: ModelFolder, processes: Processes
) -> None:
    case = case_of(name, folders_of(model_folder))
    expected, weights = train_plainly(case)
    engine = engine_of(case, processes, stage)
    lines = train_engine(engine, case)
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
    expected, _ = train_plainly(case)
    engine = engine_of(case, processes, stage, model={"dtype": "bfloat16"})
    lines = train_engine(engine, case)
    assert {value.dtype for value in engine.state_dict().values()} == {torch.bfloat16}
    engine.close()
    for key in ("loss", "loss/value", "grad_norm", "critic/grad_norm"):
        if key in expected[0]:
            assert lines[0][key] == pytest.approx(expected[0][key], rel=0.1, abs=0.02), key
    assert all(math.isfinite(value) for line in lines for value in line.values())
