"""A language model in memory, with what travels with it wherever it is sampled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from aligndistil.rollout.sampling import CutVocabulary, KeepLogps, Sample, SamplingParams, SeededSampling

_ROUTING = "output_router_logits"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, its tokenizer, and how it is sampled from: with transformers' `generate`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    """They end a response."""
    vocab: int
    """Only the first `vocab` ids are sampled: the rest is padding of the output matrix, which no model means."""
    batch_size: int
    """Prompts that are answered together."""
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered while the model is sampled from: makes its weights whole on this process where they are sharded."""
    synced: bool = False
    """Decode until every process is done, which ZeRO-3 needs."""

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> list[Sample]:
        """One response per prompt, in order; equal seeds give equal samples of equal weights."""
        samples: list[Sample] = []
        with self.whole(), _only_itself(self.model):
            for start in range(0, len(prompts), self.batch_size):
                rows = slice(start, start + self.batch_size)
                samples += self._decode(prompts[rows], params, seeds[rows])
        return samples

    def texts(self, samples: Sequence[Sample]) -> list[str]:
        """What the samples say, without special tokens."""
        ids = [list(sample.token_ids) for sample in samples]
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def _decode(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> list[Sample]:
        model, pad = self.model, self.tokenizer.pad_token_id
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        warpers = LogitsProcessorList()
        if params.temperature > 0:  # without any of these the likeliest token is taken
            if params.temperature != 1.0:
                warpers.append(TemperatureLogitsWarper(params.temperature))
            if params.top_p < 1.0:
                warpers.append(TopPLogitsWarper(params.top_p))
            warpers.append(SeededSampling(seeds, params.max_new_tokens, model.device))
        kept = KeepLogps(warpers) if params.logps else None
        config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=pad,
            use_cache=True,
        )
        output = model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([CutVocabulary(self.vocab), *(warpers if kept is None else [kept])]),
            synced_gpus=self.synced,
        )
        logps = [()] * len(prompts) if kept is None else kept.rows
        return [self._cut(row, of_row) for row, of_row in zip(output[:, width:].tolist(), logps, strict=True)]

    def _cut(self, tokens: list[int], logps: Sequence[float]) -> Sample:
        ends = (position + 1 for position, token in enumerate(tokens) if token in self.stop_ids)
        end = next(ends, None)
        return Sample(tuple(tokens[:end]), end is not None, tuple(logps[:end]))


@contextmanager
def _only_itself(model: PreTrainedModel) -> Iterator[None]:
    """Keep out of sampling what a model was published with for other uses.

    A generation configuration (a repetition penalty, say) would change the policy's own distribution, and transformers
    cannot make the balancing loss that router logits are for of a cached step.
    """
    published = model.generation_config
    model.generation_config = GenerationConfig()
    routing = [part for part in (model.config, model.config.get_text_config()) if hasattr(part, _ROUTING)]
    asked = [getattr(part, _ROUTING) for part in routing]
    for part in routing:
        setattr(part, _ROUTING, False)
    try:
        yield
    finally:
        model.generation_config = published
        for part, value in zip(routing, asked, strict=True):
            setattr(part, _ROUTING, value)
