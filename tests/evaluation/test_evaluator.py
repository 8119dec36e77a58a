"""The numbers of the final table, against their definitions in docs/metrics.md worked out with full logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from toyland import build_model, build_tokenizer

from aligndistil.batch import Row
from aligndistil.engine.processes import Processes
from aligndistil.evaluation import Evaluator, Measured, ModelToEvaluate, distinct_n, summarise
from aligndistil.rollout import Sample, SamplingParams, TransformersRollout, sample_seed

PROMPTS = [[5, 6], [7, 8, 9], [10], [11, 12, 13, 14], [15]]
PAIRS = [
    [Row([5, 6], [20, 21, 1]), Row([5, 6], [22, 1])],
    [Row([7], [23, 1]), Row([7], [24, 25, 26, 1])],
    [Row([8, 9], [27, 28, 1]), Row([8, 9], [29, 30, 31, 32, 1])],
]
ALONE = Processes(0, 1, torch.device("cpu"))


def evaluator(**settings: Any) -> Evaluator:
    defaults: dict[str, Any] = {
        "tokenizer": build_tokenizer(),
        "stop_ids": frozenset({1}),
        "prompts": PROMPTS,
        "pairs": PAIRS,
        "params": SamplingParams(8),
        "batch_size": 2,
        "seed": 0,
        "processes": ALONE,
        "scorer": None,
    }
    return Evaluator(**{**defaults, **settings})


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [build_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def measured(models: list[Any]) -> Measured:
    return evaluator().measure(ModelToEvaluate(*models))


@torch.no_grad()
def logps(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """(n, V) log-probabilities that predict each response token."""
    ids = torch.tensor([[*prompt, *response]])
    return torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)


def sequence_logp(model: Any, row: Row) -> float:
    table = logps(model, row.prompt_ids, row.response_ids)
    return float(table[torch.arange(len(row.response_ids)), torch.tensor(row.response_ids)].sum())


def test_reward_accuracy_compares_log_ratios_to_the_initial_model(models: list[Any], measured: Measured) -> None:
    policy, initial, _ = models
    right = 0
    for chosen, rejected in PAIRS:
        ratios = [sequence_logp(policy, row) - sequence_logp(initial, row) for row in (chosen, rejected)]
        right += ratios[0] > ratios[1]
    assert measured.metrics["reward_accuracy"] == right / 3


def test_the_initial_model_has_no_reward_of_its_own(models: list[Any]) -> None:
    same = evaluator().measure(ModelToEvaluate(models[0], models[0], models[0])).metrics
    assert "reward_accuracy" not in same
    assert same["kl"] == pytest.approx(0, abs=1e-5)


def test_a_tie_is_wrong(models: list[Any]) -> None:
    twin = build_model(seed=0)
    assert evaluator().measure(ModelToEvaluate(models[0], twin, twin)).metrics["reward_accuracy"] == 0


def test_divergences_are_sums_over_the_model_s_own_samples(models: list[Any], measured: Measured) -> None:
    policy, initial, other = models
    rollout = TransformersRollout(lambda: nullcontext(policy), frozenset({1}), 0, 96, batch_size=5)
    seeds = [sample_seed(0, "report", number) for number in range(len(PROMPTS))]
    sums = {"kl": 0.0, "kl_initial": 0.0}
    for prompt, sample in zip(PROMPTS, rollout.generate(PROMPTS, SamplingParams(8), seeds), strict=True):
        own = logps(policy, prompt, sample.token_ids)
        for name, model in (("kl", other), ("kl_initial", initial)):
            sums[name] += float((own.exp() * (own - logps(model, prompt, sample.token_ids))).sum())
    for name, total in sums.items():
        assert measured.metrics[name] == pytest.approx(total / len(PROMPTS), rel=1e-4)


def test_metrics_have_the_names_of_the_documentation(measured: Measured) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert {name for name in measured.metrics if f"`{name}`" not in documented} == set()


def test_a_gold_reward_is_measured_where_there_is_one(models: list[Any], measured: Measured) -> None:
    scored = evaluator(scorer=lambda texts: [float(i) for i in range(len(texts))]).measure(ModelToEvaluate(*models))
    assert scored.metrics["gold_reward"] == 2.0
    assert [row["gold_reward"] for row in scored.samples] == [0, 1, 2, 3, 4]
    assert "gold_reward" not in measured.metrics


def test_numbers_do_not_depend_on_the_batch_size(models: list[Any], measured: Measured) -> None:
    again = evaluator(batch_size=5).measure(ModelToEvaluate(*models))
    assert again.samples == measured.samples
    assert again.metrics == pytest.approx(measured.metrics, rel=1e-4)


def test_pairs_or_prompts_alone_are_enough(models: list[Any]) -> None:
    assert set(evaluator(prompts=[]).measure(ModelToEvaluate(*models)).metrics) == {"reward_accuracy"}
    assert "reward_accuracy" not in evaluator(pairs=[]).measure(ModelToEvaluate(*models)).metrics


def test_models_padded_differently_are_compared_on_the_tokens_they_share() -> None:
    wide, narrow = build_model(seed=0, vocab=128), build_model(seed=1)
    found = evaluator().measure(ModelToEvaluate(wide, narrow, narrow))
    assert all(torch.tensor(list(found.metrics.values())).isfinite())


def test_distinct_n_counts_different_neighbours() -> None:
    # a b a b: ab, ba, ab; c: none
    assert distinct_n([[1, 2, 1, 2], [3]], 2) == 2 / 3
    assert distinct_n([[1]], 2) == 0.0


def test_lengths_count_the_stop_id() -> None:
    samples = [Sample((5, 6, 1), finished=True), Sample((7,), finished=False)]
    assert summarise(samples, ["ab", "c"]) == {
        "length_mean": 2.0,
        "length_characters": 1.5,
        "truncated_fraction": 0.5,
        "distinct_2": 1.0,
    }
