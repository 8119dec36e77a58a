"""The numbers of the final table, against their definitions in docs/metrics.md worked out with full logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.batch import Batch, Row
from aligndistil.engine.processes import Processes
from aligndistil.evaluation.measurements import EvalSet
from aligndistil.evaluation.model import EvalResult, Evaluator
from aligndistil.evaluation.samples import distinct_n, values_of_samples
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from support.models import build_model, build_tokenizer

PROMPTS = [[5, 6], [7, 8, 9], [10], [11, 12, 13, 14], [15]]
PAIRS = [
    [Row([5, 6], [20, 21, 1]), Row([5, 6], [22, 1])],
    [Row([7], [23, 1]), Row([7], [24, 25, 26, 1])],
    [Row([8, 9], [27, 28, 1]), Row([8, 9], [29, 30, 31, 32, 1])],
]
ALONE = Processes(0, 1, torch.device("cpu"))


def measure(three: Sequence[Any], **settings: Any) -> EvalResult:
    """The first of three models measured, against the initial one and the one that `kl` is to."""
    model, initial, kl_to = three
    return evaluator(**settings).measure(model, initial=initial, kl_to=kl_to)


def evaluator(**settings: Any) -> Evaluator:
    content: dict[str, Any] = {
        "prompts": PROMPTS,
        "responses": [chosen for chosen, _ in PAIRS],
        "pairs": {"eval": PAIRS},
    }
    content |= {name: settings.pop(name) for name in (*content, "pairs_by_tokenizer") if name in settings}
    defaults: dict[str, Any] = {
        "eval_set": EvalSet(build_tokenizer(), frozenset({1}), **content),
        "params": SamplingParams(8),
        "batch_size": 2,
        "seed": 0,
        "processes": ALONE,
    }
    return Evaluator(**{**defaults, **settings})


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [build_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def measured(models: list[Any]) -> EvalResult:
    return measure(models)


@torch.no_grad()
def logps(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """(n, V) log-probabilities that predict each response token."""
    ids = torch.tensor([[*prompt, *response]])
    return torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)


def sequence_logp(model: Any, row: Row) -> float:
    table = logps(model, row.prompt_ids, row.response_ids)
    return float(table[torch.arange(len(row.response_ids)), torch.tensor(row.response_ids)].sum())


def test_pairs_are_given_their_summed_log_probabilities(models: list[Any], measured: EvalResult) -> None:
    expected = [(sequence_logp(models[0], chosen), sequence_logp(models[0], rejected)) for chosen, rejected in PAIRS]
    for found, wanted in zip(measured.pairs["eval"], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_the_initial_model_is_no_distance_from_itself(models: list[Any]) -> None:
    same = measure([models[0]] * 3).metrics
    assert [same[name] for name in ("kl", "kl_initial", "kl_data", "kl_initial_data")] == pytest.approx(
        [0] * 4, abs=1e-5
    )


def test_equal_models_give_equal_numbers(models: list[Any]) -> None:
    """To the last bit, so that the implicit reward of an untrained model is a tie."""
    subject, twin = (measure([model, *models[1:]]) for model in (models[0], build_model(seed=0)))
    assert subject.pairs == twin.pairs


def test_divergences_are_sums_over_the_model_s_own_samples(models: list[Any], measured: EvalResult) -> None:
    policy, initial, other = models
    loaded = LoadedModel(policy, build_tokenizer(), frozenset({1}), 96, batch_size=5)
    seeds = [sample_seed(0, "report", number) for number in range(len(PROMPTS))]
    sums = {"kl": 0.0, "kl_initial": 0.0}
    for prompt, sample in zip(PROMPTS, loaded.sample(PROMPTS, SamplingParams(8), seeds), strict=True):
        own = logps(policy, prompt, sample.token_ids)
        for name, model in (("kl", other), ("kl_initial", initial)):
            sums[name] += float((own.exp() * (own - logps(model, prompt, sample.token_ids))).sum())
    for name, total in sums.items():
        assert measured.metrics[name] == pytest.approx(total / len(PROMPTS), rel=1e-4)


def test_divergences_on_the_data_are_sums_over_its_chosen_responses(models: list[Any], measured: EvalResult) -> None:
    policy, initial, other = models
    sums = {"kl_data": 0.0, "kl_initial_data": 0.0}
    for row, _ in PAIRS:
        own = logps(policy, row.prompt_ids, row.response_ids)
        for name, model in (("kl_data", other), ("kl_initial_data", initial)):
            sums[name] += float((own.exp() * (own - logps(model, row.prompt_ids, row.response_ids))).sum())
    for name, total in sums.items():
        assert measured.metrics[name] == pytest.approx(total / len(PAIRS), rel=1e-4)


class Letters:
    """Scores a text by the sum of its token ids so far, as a causal scalar head would: padding comes after."""

    def scores(self, batch: Batch) -> torch.Tensor:
        return batch.ids_BT.cumsum(-1).float()


def test_a_scalar_head_is_read_at_the_last_response_token() -> None:
    found = evaluator().measure_scores(Letters(), "reward_model")
    assert found.metrics == {}
    sums = [[float(sum([*row.prompt_ids, *row.response_ids])) for row in pair] for pair in PAIRS]
    assert [list(pair) for pair in found.pairs["eval"]] == sums


def test_a_scalar_head_with_other_tokens_reads_the_pairs_in_its_own() -> None:
    other = [[Row([1], [2, 3]), Row([1], [4])]]
    found = evaluator(pairs_by_tokenizer={"theirs": {"eval": other}})
    assert found.measure_scores(Letters(), "theirs").pairs == {"eval": [(6.0, 5.0)]}
    assert len(found.measure_scores(Letters(), "ours").pairs["eval"]) == 3


def test_samples_are_scored_by_a_reward_model_where_there_is_one(models: list[Any], measured: EvalResult) -> None:
    scored = measure(models, reward_model=Letters())
    loaded = LoadedModel(models[0], build_tokenizer(), frozenset({1}), 96, batch_size=5)
    samples = loaded.sample(PROMPTS, SamplingParams(8), [sample_seed(0, "report", i) for i in range(len(PROMPTS))])
    scores = [sum(prompt) + sum(sample.token_ids) for prompt, sample in zip(PROMPTS, samples, strict=True)]
    assert [row["reward_score"] for row in scored.samples] == scores
    assert scored.metrics["reward_score"] == sum(scores) / len(scores)
    assert "reward_score" not in measured.metrics


def test_metrics_have_the_names_of_the_documentation(measured: EvalResult) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert {name for name in measured.metrics if f"`{name}`" not in documented} == set()


def test_a_gold_reward_is_measured_where_there_is_one(models: list[Any], measured: EvalResult) -> None:
    scored = measure(models, gold_reward=lambda texts: [float(i) for i in range(len(texts))])
    assert scored.metrics["gold_reward"] == 2.0
    assert [row["gold_reward"] for row in scored.samples] == [0, 1, 2, 3, 4]
    assert "gold_reward" not in measured.metrics


def test_numbers_do_not_depend_on_the_batch_size(models: list[Any], measured: EvalResult) -> None:
    again = measure(models, batch_size=5)
    assert again.samples == measured.samples
    assert again.metrics == pytest.approx(measured.metrics, rel=1e-4)
    for one, other in zip(again.pairs["eval"], measured.pairs["eval"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_pairs_or_prompts_alone_are_enough(models: list[Any]) -> None:
    without_prompts = measure(models, prompts=[])
    assert set(without_prompts.metrics) == {"kl_data", "kl_initial_data"}
    without_pairs = measure(models, pairs={}, responses=[])
    assert without_pairs.pairs == {}
    assert {"kl", "completions/mean_length"} < set(without_pairs.metrics)
    assert "kl_data" not in without_pairs.metrics


def test_no_pair_that_all_tokenizers_can_read_is_no_pair_measured(models: list[Any]) -> None:
    assert measure(models, pairs={"eval": []}).pairs == {"eval": []}


def share() -> list[Any]:
    """On one of two processes."""
    from aligndistil.engine.processes import start_processes

    processes = start_processes()
    found = measure([build_model(seed=seed) for seed in range(3)], processes=processes)
    processes.stop()
    return [found.metrics, found.pairs["eval"]]


def test_processes_share_the_work_and_all_know_the_result(measured: EvalResult, on_processes: Any) -> None:
    first, second = on_processes(share)
    assert first == second
    assert first[0] == pytest.approx(measured.metrics, rel=1e-4)
    assert [tuple(pair) for pair in first[1]] == [pytest.approx(pair, rel=1e-5) for pair in measured.pairs["eval"]]


def test_models_padded_differently_are_compared_on_the_tokens_they_share() -> None:
    wide, narrow = build_model(seed=0, vocab=128), build_model(seed=1)
    found = measure([wide, narrow, narrow])
    assert all(torch.tensor(list(found.metrics.values())).isfinite())


def test_distinct_n_counts_different_neighbours() -> None:
    # a b a b: ab, ba, ab; c: none
    assert distinct_n([[1, 2, 1, 2], [3]], 2) == 2 / 3
    assert distinct_n([[1, 2, 1, 2], [3]], 1) == 3 / 5
    assert distinct_n([[1]], 2) == 0.0


def test_lengths_count_the_stop_id() -> None:
    samples = [Sample((5, 6, 1), finished=True), Sample((7,), finished=False)]
    assert values_of_samples(samples, ["ab", "c"]) == {
        "completions/mean_length": [3.0, 1.0],
        "length_characters": [2.0, 1.0],
        "completions/truncated_fraction": [0.0, 1.0],
    }
