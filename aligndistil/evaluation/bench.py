"""What the models of a comparison are asked: prompts, and pairs in the tokens of whoever reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from aligndistil.batch import Row

Pairs: TypeAlias = Mapping[str, Sequence[Sequence[Row]]]
"""By split; chosen and rejected, each pair."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The same for all models of a table."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    prompts: Sequence[Sequence[int]]
    pairs: Pairs
    foreign_pairs: Mapping[str, Pairs] = field(default_factory=dict)
    """The same pairs as another tokenizer has them, by the name of the scalar model that reads it."""

    def content_hash(self) -> str:
        """SHA-256 of the tokens that are asked, and of those that end an answer."""
        return _hash([sorted(self.stop_ids), list(map(list, self.prompts)), _tokens(self.pairs)])

    def foreign_hash(self, name: str) -> str:
        """The same of what a scalar model reads otherwise; empty for one that reads what all do."""
        return _hash([_tokens(self.foreign_pairs[name])]) if name in self.foreign_pairs else ""


def _tokens(pairs: Pairs) -> dict[str, object]:
    return {
        split: [[(list(row.prompt_ids), list(row.response_ids)) for row in pair] for pair in given]
        for split, given in pairs.items()
    }


def _hash(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
