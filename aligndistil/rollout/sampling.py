"""What a rollout is asked and what it answers, and random numbers that belong to a sample, not to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy: always the likeliest token, whatever the seed."""
    top_p: float = 1.0
    logps: bool = False
    """Whether the samples also say how likely generation held their tokens for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response."""

    token_ids: tuple[int, ...]
    """Stop id included, when there is one."""
    finished: bool
    """False when `max_new_tokens` cut the response: it then has no stop id, and gets none."""
    logps: tuple[float, ...] = ()
    """Of each token, in nats: its log-probability under the model that generated it, before temperature and top_p.
    Empty where it was not asked for."""


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed from what identifies a sample: the run's seed, the step, the prompt, the sample's number."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class CutVocabulary(LogitsProcessor):  # type: ignore[misc]
    """Keeps only the first `vocab` ids, as the log-probabilities of training do."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:, : self._vocab]  # and no -inf: how many numbers are drawn must not depend on padding either


class KeepLogps(LogitsProcessor):  # type: ignore[misc]
    """Does what a chain of processors does, and keeps how likely each token was before them that is chosen after them:
    transformers takes the largest.
    """

    def __init__(self, chain: LogitsProcessorList) -> None:
        self._chain = chain
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen: Tensor = self._chain(input_ids, scores)  # type: ignore[arg-type]
        tokens = chosen.argmax(-1, keepdim=True)
        self._steps.append(torch.log_softmax(scores.float(), dim=-1).gather(-1, tokens).squeeze(-1))
        return chosen

    @property
    def rows(self) -> list[list[float]]:
        """Of each row, one number a step."""
        kept: list[list[float]] = torch.stack(self._steps, dim=-1).tolist()
        return kept


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding draw from the softmax: every token by a number of its own, uniform between 0 and 1.

    A row's numbers are known before it is decoded, from its seed. They therefore do not depend on which rows it is
    decoded with, on the device, or on what was drawn before: a resumed run draws the same samples.
    """

    def __init__(self, seeds: Sequence[int], tokens: int, device: torch.device) -> None:
        """For up to so many tokens a row."""
        numbers = np.stack([np.random.Generator(np.random.Philox(seed)).random(tokens) for seed in seeds], axis=1)
        self._numbers = iter(torch.from_numpy(numbers).to(device).unsqueeze(-1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The first token up to which the probabilities add up to more than the number; float64 for large vocabularies.
        up_to = torch.softmax(scores.double(), dim=-1).cumsum(-1)
        drawn = torch.searchsorted(up_to, next(self._numbers) * up_to[:, -1:], right=True)
        return torch.zeros_like(scores).scatter_(-1, drawn, 1.0)
