"""Samples come from the policy's own distribution, belong to their seed, and end where the policy ended them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from aligndistil.batch import DataKind, Row, collate
from aligndistil.engine.rows import Body
from aligndistil.rollout import LoadedModel, Sample, SamplingParams, sample_seed
from support.models import EOS, PAD, build_model, build_tokenizer

STOPS = frozenset({EOS})
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
SEEDS = [sample_seed(0, number) for number in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(seed=3)


def rollout(model: Any, *, stops: frozenset[int] = STOPS, vocab: int = 96, batch_size: int = 4) -> LoadedModel:
    return LoadedModel(model, build_tokenizer(), stops, vocab, batch_size)


def next_token(model: Any, prompt: list[int]) -> torch.Tensor:
    """Probabilities after a prompt, without padding or cache."""
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1], -1)


def drawn(model: Any, prompt: list[int], count: int, **params: Any) -> torch.Tensor:
    """How often each token was sampled first."""
    settings = SamplingParams(max_new_tokens=1, **params)
    seeds = [sample_seed("first token", number) for number in range(count)]
    samples = rollout(model, batch_size=500).sample([prompt] * count, settings, seeds)
    return torch.bincount(torch.tensor([sample.token_ids[0] for sample in samples]), minlength=96).float()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens expected less than five times count as one."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    pairs = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    pairs = [(found, wanted) for found, wanted in pairs if wanted > 0]
    return float(sum((found - wanted) ** 2 / wanted for found, wanted in pairs)), len(pairs) - 1


def within_chance(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """A statistic with k degrees of freedom has mean k and variance 2k: five deviations are one in a million."""
    statistic, freedom = chi_square(counts, probabilities)
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(model: Any) -> None:
    counts = drawn(model, [5, 6], 3000)
    own = next_token(model, [5, 6])
    assert within_chance(counts, own)
    # The test has power: neither another temperature nor the uniform distribution passes it.
    assert not within_chance(counts, torch.softmax(own.log() / 0.8, -1))
    assert not within_chance(counts, torch.full((96,), 1 / 96))


def test_temperature_divides_the_logits(model: Any) -> None:
    counts = drawn(model, [5, 6], 3000, temperature=0.5)
    own = next_token(model, [5, 6])
    assert within_chance(counts, torch.softmax(own.log() / 0.5, -1))
    assert not within_chance(counts, own)


def test_top_p_keeps_the_smallest_set_with_that_probability(model: Any) -> None:
    own = next_token(model, [5, 6])
    ordered, order = own.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < 0.6).sum()) + 1]
    inside = torch.zeros(96).index_fill(0, kept, 1.0)
    counts = drawn(model, [5, 6], 2000, top_p=0.6)
    assert (counts * (1 - inside)).sum() == 0
    assert within_chance(counts, own * inside / (own * inside).sum())


def test_a_sample_does_not_depend_on_the_rows_beside_it(model: Any) -> None:
    together = rollout(model).sample(PROMPTS, SamplingParams(20), SEEDS)
    alone = [rollout(model).sample([p], SamplingParams(20), [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    backwards = rollout(model, batch_size=3).sample(PROMPTS[::-1], SamplingParams(20), SEEDS[::-1])
    assert together == alone == backwards[::-1]
    assert len({len(sample.token_ids) for sample in together}) > 1  # some go on when others have stopped


def test_equal_seeds_give_equal_samples_and_others_others(model: Any) -> None:
    torch.manual_seed(1)
    first = rollout(model).sample(PROMPTS, SamplingParams(20), SEEDS)
    torch.manual_seed(2)
    assert rollout(model).sample(PROMPTS, SamplingParams(20), SEEDS) == first
    others = [sample_seed(1, number) for number in range(4)]
    assert rollout(model).sample(PROMPTS, SamplingParams(20), others) != first


def test_sampling_leaves_the_run_s_own_random_numbers_alone(model: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rollout(model).sample(PROMPTS, SamplingParams(5), SEEDS)
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_says_what_the_sample_is_and_nothing_else() -> None:
    assert sample_seed(0, 5, "data.jsonl#train:3", 1) == sample_seed(0, 5, "data.jsonl#train:3", 1)
    assert len({sample_seed(0, step, key, k) for step in range(5) for key in "abc" for k in range(4)}) == 60
    assert sample_seed(1, 11) != sample_seed(11, 1) != sample_seed("1", "1", 1)
    assert 0 <= sample_seed(0) < 2**63


def test_a_response_ends_with_its_stop_id_or_is_truncated_without_one(model: Any) -> None:
    stops = frozenset(range(1, 20))
    samples = rollout(model, stops=stops).sample(PROMPTS * 8, SamplingParams(4), [sample_seed(i) for i in range(32)])
    assert {sample.finished for sample in samples} == {True, False}
    for sample in samples:
        assert not stops & set(sample.token_ids[:-1])
        assert sample.finished == (sample.token_ids[-1] in stops)
        assert sample.finished or len(sample.token_ids) == 4
    assert all(isinstance(sample, Sample) for sample in samples)


def test_padding_on_the_left_is_not_seen(model: Any) -> None:
    """What a token was drawn from beside longer prompts is what training computes for it, padded on the right."""
    samples = rollout(model).sample(PROMPTS, SamplingParams(6), SEEDS)
    batch = collate([Row(p, s.token_ids) for p, s in zip(PROMPTS, samples, strict=True)], DataKind.RESPONSES, PAD)
    with torch.no_grad():
        logits = model.lm_head(Body(model).response_states(batch))
    position = 0
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        for length in range(len(sample.token_ids)):
            own = next_token(model, [*prompt, *sample.token_ids[:length]])
            torch.testing.assert_close(torch.softmax(logits[position], -1), own, atol=1e-5, rtol=0)
            position += 1
    assert position == len(logits)


def test_the_settings_a_model_was_published_with_do_not_leak_in(model: Any) -> None:
    clean = rollout(model).sample(PROMPTS, SamplingParams(12), SEEDS)
    loud = build_model(seed=3)
    loud.generation_config = GenerationConfig(
        repetition_penalty=3.0, no_repeat_ngram_size=1, top_k=1, temperature=0.1, do_sample=True, max_new_tokens=2,
        suppress_tokens=[7], forced_eos_token_id=9, min_new_tokens=11, eos_token_id=50, bad_words_ids=[[6]],
    )  # fmt: skip
    published = loud.generation_config
    assert rollout(loud).sample(PROMPTS, SamplingParams(12), SEEDS) == clean
    assert loud.generation_config is published


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.8}, {"temperature": 0.0}],
    ids=["itself", "sharper", "cut", "greedy"],
)
def test_a_sample_says_how_likely_its_tokens_were_whatever_it_was_drawn_with(params: dict[str, float]) -> None:
    """Among the ids of the tokenizer, at temperature 1."""
    wide, stops = build_model(seed=3, vocab=160), frozenset(range(1, 20))
    loaded = rollout(wide, stops=stops)
    settings = SamplingParams(8, **params)
    samples = loaded.sample(PROMPTS, replace(settings, logps=True), SEEDS)
    assert [sample.token_ids for sample in samples] == [s.token_ids for s in loaded.sample(PROMPTS, settings, SEEDS)]
    assert {sample.logps for sample in loaded.sample(PROMPTS, settings, SEEDS)} == {()}
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        with torch.no_grad():
            logits = wide(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1, :96]
        own = logits.log_softmax(-1)[torch.arange(len(sample.token_ids)), list(sample.token_ids)]
        torch.testing.assert_close(torch.tensor(sample.logps), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen3_moe"])
def test_router_logits_are_for_training_alone(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    known = AutoConfig.for_model(kind).to_dict().keys()
    config = {"vocab_size": 96, "num_key_value_heads": 2, "pad_token_id": PAD, **sizes, **experts}
    torch.manual_seed(0)
    asked = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{name: value for name, value in config.items() if name in known})
    ).eval()
    quiet = rollout(asked).sample(PROMPTS, SamplingParams(6), SEEDS)
    asked.config.output_router_logits = True
    assert rollout(asked).sample(PROMPTS, SamplingParams(6), SEEDS) == quiet
    assert asked.config.output_router_logits


def test_rows_that_only_pad_the_output_matrix_are_never_sampled() -> None:
    """A policy with 160 rows beside a teacher with 96: training knows log-probabilities of the first 96 alone."""
    wide = build_model(seed=3, vocab=160)
    seeds = [sample_seed(number) for number in range(100)]
    free = rollout(wide, vocab=160, batch_size=100).sample([[5, 6]] * 100, SamplingParams(3), seeds)
    cut = rollout(wide, vocab=96, batch_size=100).sample([[5, 6]] * 100, SamplingParams(3), seeds)
    assert max(max(sample.token_ids) for sample in free) >= 96
    assert max(max(sample.token_ids) for sample in cut) < 96


def test_no_prompts_give_no_samples(model: Any) -> None:
    assert rollout(model).sample([], SamplingParams(2), []) == []


def test_the_model_is_made_whole_around_all_its_batches(model: Any) -> None:
    entered: list[str] = []

    @contextmanager
    def whole() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    loaded = replace(rollout(model, batch_size=3), whole=whole)
    assert loaded.sample(PROMPTS, SamplingParams(2), SEEDS) == rollout(model).sample(PROMPTS, SamplingParams(2), SEEDS)
    assert entered == ["in", "out"]


def test_texts_are_without_special_tokens(model: Any) -> None:
    samples = [Sample((5, 6, EOS), finished=True), Sample((7,), finished=False)]
    assert rollout(model).texts(samples) == ["w00 w01", "w02"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_the_same_seeds_give_the_same_samples_again(dtype: str) -> None:
    model = build_model(seed=3).to("cuda", getattr(torch, dtype))
    once, again = (rollout(model).sample(PROMPTS, SamplingParams(20), SEEDS) for _ in range(2))
    assert once == again
    assert len({sample.token_ids for sample in once}) == len(PROMPTS)


@pytest.mark.gpu
def test_on_a_gpu_a_sample_belongs_to_its_seed_whatever_the_batch() -> None:
    model = build_model(seed=3).to("cuda")
    together = rollout(model).sample(PROMPTS, SamplingParams(20), SEEDS)
    assert rollout(model, batch_size=1).sample(PROMPTS, SamplingParams(20), SEEDS) == together
