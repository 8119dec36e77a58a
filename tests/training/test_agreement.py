"""Samples of a policy are the policy's: generation and training say the same of each token, or the stage stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.engine.processes import Processes, start_processes
from aligndistil.errors import EXIT_DIVERGED
from aligndistil.training.agreement import LIMITS, compare_sampling
from aligndistil.training.batches import StepBatch
from support.models import EOS, PAD, build_tokenizer
from support.recipes import off_policy, on_policy
from support.run_folders import lines

ModelFolder = Callable[..., str]


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its state runs over padding, so that generation is wrong where prompts of other lengths are beside it."""
    folder = tmp_path_factory.mktemp("rwkv")
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", vocab_size=96, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@dataclass
class Trained:
    """As much of an engine as says how likely tokens are: the same of each."""

    says: float
    processes: Processes
    dtype: torch.dtype = torch.float32

    @property
    def model(self) -> Any:
        return SimpleNamespace(dtype=self.dtype)

    def log_probabilities(self, batch: Batch) -> Tensor:
        return self.says * batch.response_BT


ALONE = Processes(0, 1, torch.device("cpu"))
BATCH = collate([Row([5, 6], [7, 8, 1]), Row([5], [1]), Row([9, 9, 9], [4, 4])], DataKind.RESPONSES, PAD)


def told(*numbers: float) -> StepBatch:
    """Two micro-batches, and what generation said of their six tokens."""
    said = torch.tensor(numbers, dtype=torch.float32)
    said_BT = torch.zeros(BATCH.response_BT.shape).masked_scatter(BATCH.response_BT, said)
    return StepBatch(BATCH, 3, [[[0, 1], [2]]], sampled_logp_BT=said_BT)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("shares", "wrong"),
    [
        ((0.0,) * 6, False),
        ((0.9,) * 6, False),
        ((-0.9, 0.9) * 3, False),
        ((5.5, 0, 0, 0, 0, 0), False),  # one token, as by another expert
        ((-1.1, 1.1) * 3, True),  # they do not cancel
        ((0, 0, 0, 0, 0, 6.5), True),
        ((0, float("nan"), 0, 0, 0, 0), True),
    ],
)
def test_the_mean_distance_of_all_tokens_has_a_limit(
    dtype: torch.dtype, shares: tuple[float, ...], wrong: bool
) -> None:
    """In shares of it."""
    limit = LIMITS[dtype]
    found = compare_sampling(Trained(-2.0, ALONE, dtype), told(*(-2 + limit * one for one in shares)))  # type: ignore[arg-type]
    assert bool(found.problem) == wrong
    if not any(share != share for share in shares):
        mean = sum(map(abs, shares)) * limit / 6
        assert found.sums.means() == {"rollout/logp_diff": pytest.approx(mean, abs=1e-6)}
        most = max(map(abs, shares)) * limit
        assert found.sums.maxima == {"rollout/logp_diff_max": pytest.approx(most, abs=1e-6)}


def test_both_numbers_of_the_token_that_is_furthest_off_are_named() -> None:
    found = compare_sampling(Trained(-2.0, ALONE), told(-2, -2.5, -2, -2, -9, -2))  # type: ignore[arg-type]
    assert "differ by 1.2 nats on average and 7 at most (-9.00 against -2.00), and 0.01" in found.problem


def on_rank() -> list[str]:
    """The second process has the tokens that are off."""
    processes = start_processes()
    off = told(-2, -2, -2, -2, -9 if processes.rank else -2, -2)
    problem = compare_sampling(Trained(-2.0, processes), off).problem  # type: ignore[arg-type]
    processes.stop()
    return [problem]


def test_all_processes_stop_for_the_tokens_of_one(on_processes: Any) -> None:
    first, second = on_processes(on_rank)
    assert first == second
    assert "differ by 0.58 nats on average and 7 at most (-9.00 against -2.00)" in first[0]


def test_a_stage_stops_whose_samples_are_not_its_policy_s(
    rwkv: str, pairs_file: Callable[..., str], recipe_file: Callable[..., Path], command_line: Callable[..., Any]
) -> None:
    content = on_policy(rwkv, rwkv, rwkv, pairs_file(10), train={"max_steps": 2}, rollout={"batch_size": 4})
    sizes = {"evaluation": {"samples": 0, "every": None}, "report": {"batch_size": 1}}
    recipe = recipe_file({**content, **{key: {**content[key], **size} for key, size in sizes.items()}})
    code, _, err = command_line("train", recipe)
    assert code == EXIT_DIVERGED
    assert "stage aligndistil: generation gives the sampled tokens other log-probabilities than training" in err
    assert "write rollout.batch_size: 1 if the model is wrong where rows are padded together" in err
    stage = recipe.parent / "runs/toy/aligndistil"
    assert not (stage / "metrics.jsonl").exists()
    assert command_line("train", recipe, "--set", "rollout.batch_size=1", "--set", "logging.every=1")[0] == 0
    first, second = (line for line in lines(stage) if line["split"] == "train")
    assert first["rollout/logp_diff"] <= first["rollout/logp_diff_max"] < 1e-4
    assert not {key for key in second if "logp_diff" in key}


def test_samples_of_evaluations_and_comparisons_are_compared_too(
    rwkv: str, pairs_file: Callable[..., str], recipe_file: Callable[..., Path], command_line: Callable[..., Any]
) -> None:
    """Training on given responses is right, and ends; its comparison is not made of samples that are not."""
    content = off_policy(rwkv, pairs_file(10), train={"max_steps": 2}, evaluation={"every": 1, "batch_size": 3})
    recipe = recipe_file(content)
    code, _, err = command_line("train", recipe)
    assert code == EXIT_DIVERGED
    assert "does not sample what it means" in err
    assert "write report.batch_size: 1" in err
    stage = recipe.parent / "runs/toy/dpo"
    warned = (stage / "logs/rank-0.log").read_text()
    assert warned.count("stage dpo: evaluation.samples: generation gives the sampled tokens other") == 1
    trained = json.loads((stage / "done.json").read_text())["weights"]
    assert command_line("train", recipe, "--set", "report.batch_size=1")[0] == 0
    assert json.loads((stage / "done.json").read_text())["weights"] == trained
