"""What is measured of sampled responses while a stage trains, and how they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Batch
from aligndistil.maths import Metric
from aligndistil.rollout import Sample


def completion_metrics(samples: Sequence[Sample]) -> dict[str, Metric]:
    """Mean length in tokens, EOS included, and the share without an end."""
    count = torch.tensor(float(len(samples)))
    tokens = torch.tensor(float(sum(len(sample.token_ids) for sample in samples)))
    truncated = torch.tensor(float(sum(not sample.finished for sample in samples)))
    return {
        "completions/mean_length": Metric(tokens, count),
        "completions/truncated_fraction": Metric(truncated, count),
    }


def sampled_logps(batch: Batch, samples: Sequence[Sample]) -> Tensor:
    """(B, T) what generation says of the response tokens of a batch that was made of these samples, zero elsewhere."""
    flat = torch.tensor([logp for sample in samples for logp in sample.logps])
    return torch.zeros(batch.response_BT.shape).masked_scatter(batch.response_BT, flat)


def sample_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    texts: Sequence[str],
    scores: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """Samples as they are written to `samples/`: texts for people, token ids for programs."""
    rows = []
    for i, (prompt, sample, text) in enumerate(zip(prompts, samples, texts, strict=True)):
        row = {
            "prompt": tokenizer.decode(list(prompt)),
            "response": text,
            "finished": sample.finished,
            "token_ids": list(sample.token_ids),
        }
        rows.append(row if scores is None else {**row, "gold_reward": scores[i]})
    return rows
