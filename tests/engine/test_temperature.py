"""PPO and RTO on samples of another temperature: what is trained is the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from aligndistil.batch import DataKind, Row, collate
from aligndistil.engine.engine import Engine
from aligndistil.engine.processes import Processes
from aligndistil.maths import sum_tokens
from aligndistil.rollout import SamplingParams, sample_seed
from support.engines import CONSTANT, make_engine, objective, sampler
from support.models import PAD
from support.step_batches import case_of, engine_of, folders_of, train_engine, train_plainly, whole_weights

ModelFolder = Callable[..., str]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("name", "stage"), [("ppo", 0), ("rto", 0), ("ppo", 3)])
def test_rounds_are_those_of_plain_torch_with_divided_logits(
    name: str, stage: int, temperature: float, model_folder: ModelFolder, processes: Processes
) -> None:
    """Of policy, old policy and reference; scores, values and the reward of a DPO model stay what they are."""
    case = replace(case_of(name, folders_of(model_folder)), temperature=temperature)
    expected, weights = train_plainly(case)
    engine = engine_of(case, processes, stage)
    lines = train_engine(engine, case)
    for ours, theirs in zip(lines, expected, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, abs=2e-5)
    with whole_weights(engine) as trained:
        for (model, parameters), rate in zip(weights.items(), case.rates, strict=True):
            for key, value in parameters.items():
                far = (trained[model][key] - value).abs() > 0.02 * rate
                assert float(far.float().mean()) < 0.002, f"{model}: {key}"
    engine.close()
    at_one, _ = train_plainly(replace(case, temperature=1.0))
    for key in ("objective/kl", "kl/policy_reference", "grad_norm"):
        assert at_one[0][key] != pytest.approx(expected[0][key], rel=0.05), key
    for key in {"objective/scores", "objective/rewards_teacher"} & expected[0].keys():
        assert at_one[0][key] == pytest.approx(expected[0][key], rel=1e-5), key


@pytest.mark.parametrize("name", ["ppo", "rto"])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_sampled_kl_is_the_exact_one_within_its_standard_error(
    name: str, temperature: float, model_folder: ModelFolder, processes: Processes
) -> None:
    """The first is what the reward is charged for; it means something on samples of the policy that is scored alone."""
    folders = folders_of(model_folder)
    frozen = case_of(name, folders).frozen
    train = {**CONSTANT, "batch_size": 4, "micro_batch_size": 4}

    def made(read_at: float) -> Engine:
        return make_engine(
            objective(name, **({"version": "v3"} if name == "rto" else {})),
            folders["policy"],
            frozen,
            processes,
            train=train,
            engine={"zero_stage": 0},
            critic=folders["critic"],
            temperature=read_at,
        )

    engine, prompts = made(temperature), [[5 + i % 90, 7] for i in range(400)]
    seeds = [sample_seed("kl", i) for i in range(len(prompts))]
    samples = replace(sampler(engine), batch_size=200).sample(prompts, SamplingParams(8, temperature), seeds)
    rows = [Row(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
    batch = collate(rows, DataKind.RESPONSES, PAD)

    def off(engine: Engine) -> float:
        """Sampled less exact KL of a response, in standard errors."""
        with torch.no_grad():
            terms = engine.terms(batch, preparing=True)
        error_B = sum_tokens(terms["kl_sampled"] - terms["kl"], batch.response_BT)
        return abs(float(error_B.mean() / error_B.std() * len(rows) ** 0.5))

    assert off(engine) < 4
    engine.close()
    other = made(1.0)  # scores another policy than the one that sampled
    assert off(other) > 8
    other.close()
