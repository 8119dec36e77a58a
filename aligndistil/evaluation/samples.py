"""Numbers about sampled responses."""

from __future__ import annotations

from collections.abc import Sequence

from aligndistil.rollout import Sample


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among those of all sequences (Li et al. 2016, arXiv 1510.03055); 0 without any."""
    grams = [tuple(tokens[i : i + n]) for tokens in sequences for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def summarise(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Mean length in tokens (stop id included) and characters, truncated fraction, distinct-1 and distinct-2."""
    count = len(samples)
    tokens = [sample.token_ids for sample in samples]
    return {
        "length_mean": sum(map(len, tokens)) / count,
        "length_characters": sum(map(len, texts)) / count,
        "truncated_fraction": sum(not sample.finished for sample in samples) / count,
        "distinct_1": distinct_n(tokens, 1),
        "distinct_2": distinct_n(tokens, 2),
    }
