"""Rollouts with transformers' `generate`, from the live policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from aligndistil.rollout.sampling import CutVocabulary, Sample, SamplingParams, SeededSampling


class TransformersRollout:
    """Samples from a model that is whole on this process while `policy()` is entered."""

    def __init__(
        self,
        policy: Callable[[], AbstractContextManager[PreTrainedModel]],
        stop_ids: frozenset[int],
        pad_id: int,
        vocab: int,
        batch_size: int,
        synced: bool = False,
    ) -> None:
        """Only the first `vocab` ids are sampled: the rest is padding of the output matrix, which no model means.

        `synced` keeps decoding until every process is done, which ZeRO-3 needs.
        """
        self._policy, self._stops, self._pad, self._batch_size = policy, sorted(stop_ids), pad_id, batch_size
        self._vocab, self._synced = vocab, synced

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> list[Sample]:
        """One sample per prompt, in order; equal seeds give equal samples of equal weights."""
        samples: list[Sample] = []
        with self._policy() as model, _own_generation_config(model):
            for start in range(0, len(prompts), self._batch_size):
                rows = slice(start, start + self._batch_size)
                samples += self._decode(model, prompts[rows], params, seeds[rows])
        return samples

    @torch.no_grad()
    def _decode(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sample]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        warpers = LogitsProcessorList([CutVocabulary(self._vocab)])
        if params.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_p < 1.0:
            warpers.append(TopPLogitsWarper(params.top_p))
        warpers.append(SeededSampling(seeds, model.device))
        config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            eos_token_id=self._stops,
            pad_token_id=self._pad,
            use_cache=True,
        )
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=config,
            logits_processor=warpers,
            synced_gpus=self._synced,
        )
        samples = []
        for tokens in output[:, width:].tolist():
            end = next((position for position, token in enumerate(tokens) if token in self._stops), None)
            samples.append(Sample(tuple(tokens if end is None else tokens[: end + 1]), finished=end is not None))
        return samples


@contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model's published settings (a repetition penalty, say) out of the policy's own distribution."""
    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = published
