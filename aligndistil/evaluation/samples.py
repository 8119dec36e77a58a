"""Numbers about sampled responses."""

from __future__ import annotations

from collections.abc import Sequence

from aligndistil.rollout import Sample


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among those of all sequences (Li et al. 2016, arXiv 1510.03055); 0 without any."""
    grams = [tuple(tokens[i : i + n]) for tokens in sequences for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def values_of_samples(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, list[float]]:
    """Of each sample: its length in tokens (stop id included) and characters, and whether it has no end."""
    return {
        "completions/mean_length": [float(len(sample.token_ids)) for sample in samples],
        "length_characters": [float(len(text)) for text in texts],
        "completions/truncated_fraction": [float(not sample.finished) for sample in samples],
    }
