"""A data section -> examples: every source read, encoded once for all processes, checked, and mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind, Row
from aligndistil.data.cache import DESIRABLE, FLAGS, PROMPT_TRUNCATED, RESPONSE_TRUNCATED, SHIFTED, EncodedRows, cached
from aligndistil.data.encoded_source import Progress, encode_source
from aligndistil.data.encoding import Encoder
from aligndistil.data.report import DropReport, merge_reports
from aligndistil.data.sources import content_hash
from aligndistil.errors import UserError
from aligndistil.recipe import Data, Source

CACHE_VERSION = 1
"""Raised whenever the same rows give other tokens, so that older caches are not read."""
MISMATCHES_TOLERATED = 0.001
"""The share of rows whose boundary `on_boundary_mismatch: error` moves instead of refusing."""
NO_BOUNDARY = "the prompt's tokens are not the first tokens of the whole row"


@dataclass(frozen=True, slots=True)
class _Part:
    """A source, encoded, and which of its examples are used."""

    name: str
    encoded: EncodedRows
    used: NDArray[np.int64]
    report: DropReport
    key: str


class Examples:
    """The examples of a section, by index. What they are is `kind`; see `load_examples`."""

    def __init__(self, kind: DataKind, parts: Sequence[_Part], weights: Sequence[float], seed: int) -> None:
        self.kind = kind
        self.report = merge_reports(part.report for part in parts)
        depends_on = json.dumps([[part.key for part in parts], list(weights), seed, self.report.used])
        self.content_hash = hashlib.sha256(depends_on.encode()).hexdigest()
        """SHA-256 of everything the examples and their order depend on."""
        self._parts = parts
        self._rows_each = 2 if kind is DataKind.PAIRS else 1
        weighted = enumerate(zip(parts, weights, strict=True))
        taken = [_take(part.used, weight, seed, place) for place, (part, weight) in weighted]
        self._index = np.concatenate([np.stack([np.full(len(t), i), t], 1) for i, t in enumerate(taken)])

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, index: int) -> list[Row]:
        """Two rows for PAIRS, chosen first; else one. For PROMPTS it has no response tokens."""
        part, example = self._find(index)
        tokens, first = part.encoded.tokens, example * self._rows_each
        rows = []
        for start, prompt_length, response_length, flags in part.encoded.rows[first : first + self._rows_each].tolist():
            middle, end = start + prompt_length, start + prompt_length + response_length
            rows.append(Row(tokens[start:middle].tolist(), tokens[middle:end].tolist(), bool(flags & DESIRABLE)))
        return rows

    def key(self, index: int) -> str:
        """The raw row the example came from, `path#split:number`: the same in every run and for every repetition.

        A second source of the same path and split is called `path#split(2)`.
        """
        part, example = self._find(index)
        return f"{part.name}:{part.encoded.origins[example]}"

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt, which the rows of a pair share."""
        return list(self.rows(index)[0].prompt_ids)

    def _find(self, index: int) -> tuple[_Part, int]:
        place, example = self._index[index]
        return self._parts[place], int(example)


def load_examples(
    section: Data,
    which: Literal["train", "eval"],
    kind: DataKind,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Examples:
    """The examples of `section.train` or `section.eval` that an objective whose data are `kind` is given.

    Call it before there is a process group. A source's `weight` is how often an epoch sees its examples: 2 sees each
    twice, 0.25 sees a quarter of them, drawn once by `seed`; sources of different size are not made equal.

    Raises:
        UserError: a source is not there, does not fit the objective, has more than `max_dropped_fraction` rows that
            cannot be used or none that can, or its prompts have no clean boundary.
        ServiceError: the Hub failed.
        ValueError: the section has no such part.
    """
    sources = section.train if which == "train" else section.eval
    if sources is None:
        raise ValueError(f"the section has no data.{which}")
    encoder = Encoder(
        tokenizer,
        stop_ids=stop_ids,
        max_prompt_length=section.max_prompt_length,
        max_response_length=section.max_response_length,
    )
    parts: list[_Part] = []
    for source in sources:
        read = sum(part.report.rows_read for part in parts)
        part = _load_part(section, which, source, kind, encoder, _counting_on(on_progress, read))
        # Sources may share path and split, and differ in columns: their rows are others.
        repeated = sum(other.name == part.name or other.name.startswith(f"{part.name}(") for other in parts)
        parts.append(replace(part, name=f"{part.name}({repeated + 1})") if repeated else part)
    return Examples(kind, parts, [source.weight for source in sources], seed)


def _counting_on(on_progress: Progress | None, read: int) -> Progress | None:
    return None if on_progress is None else lambda done, total: on_progress(read + done, read + total)


def _load_part(
    section: Data, which: str, source: Source, kind: DataKind, encoder: Encoder, on_progress: Progress | None
) -> _Part:
    reverse = section.reverse_preferences
    read_as = [source.name, source.split, str(source.format), sorted(source.columns.items()), source.limit]
    content = [CACHE_VERSION, content_hash(source), read_as, str(kind), reverse, encoder.fingerprint()]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    encoded = cached(key, lambda: encode_source(source, kind, encoder, reverse=reverse, on_progress=on_progress))
    where = f"data.{which}: {source.path}, split {source.split}"
    used, report = _select(encoded, str(section.on_boundary_mismatch), where)
    _refuse_dropped(report, section.max_dropped_fraction, where)
    return _Part(f"{source.path}#{source.split}", encoded, used, report, key)


def _select(encoded: EncodedRows, on_mismatch: str, where: str) -> tuple[NDArray[np.int64], DropReport]:
    """The examples to use, after `on_boundary_mismatch`, and the report of the source."""
    report = DropReport(rows_read=encoded.rows_read, left_out=encoded.left_out)
    for reason, number in encoded.dropped:
        report.drop(reason, number)
    count = len(encoded.origins)
    flags = encoded.rows[:, FLAGS].reshape(count, -1) if count else np.zeros((0, 1), dtype=np.int64)
    shifted = (flags[:, 0] & SHIFTED) > 0
    if on_mismatch == "error" and shifted.sum() > MISMATCHES_TOLERATED * count:
        named = DropReport()
        for number in encoded.origins[shifted].tolist():
            named.drop(NO_BOUNDARY, number)
        raise UserError(
            f"{where}: {named.reasons()} of {count}: the tokenizer merges the end of the prompt with the beginning of "
            "the response, or the chat template rewrites the conversation; look at them with `aligndistil validate "
            "--rows 3`, and set data.on_boundary_mismatch to shift (the boundary moves into the prompt) or drop"
        )
    if on_mismatch == "drop":
        for number in encoded.origins[shifted].tolist():
            report.drop(NO_BOUNDARY, number)
    used = np.flatnonzero(~shifted) if on_mismatch == "drop" else np.arange(count)
    report.used = len(used)
    report.truncated_prompts = int(((flags[used, 0] & PROMPT_TRUNCATED) > 0).sum())
    report.truncated_responses = int(((flags[used] & RESPONSE_TRUNCATED) > 0).sum())
    report.shifted = int(shifted[used].sum())
    return used, report


def _refuse_dropped(report: DropReport, allowed: float, where: str) -> None:
    beginning = f"{where}: {report.dropped_count} of {report.used + report.dropped_count} examples cannot be used"
    if report.dropped_fraction > allowed:
        raise UserError(
            f"{beginning}, more than data.max_dropped_fraction ({allowed:g}): {report.reasons()}; mend the rows, or "
            "raise data.max_dropped_fraction"
        )
    if report.used == 0:
        reasons = report.reasons() or "no row is desirable"
        raise UserError(f"{beginning} and none is left: {reasons}; give another source")


def _take(used: NDArray[np.int64], weight: float, seed: int, place: int) -> NDArray[np.int64]:
    """`used` as often as the weight says: whole copies, then a random part, in order."""
    copies = int(weight)
    extra = round((weight - copies) * len(used))
    if copies == 0:
        extra = max(1, extra)
    drawn = np.random.default_rng([seed, place]).permutation(len(used))[:extra]
    return np.concatenate([np.tile(used, copies), used[np.sort(drawn)]])
