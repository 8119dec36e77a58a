"""A data section -> examples: every source read, encoded once for all processes, checked, held out, and mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from aligndistil.batch import DataKind, Row
from aligndistil.data.cache import (
    DESIRABLE,
    FLAGS,
    PROMPT_LENGTH,
    PROMPT_TRUNCATED,
    RESPONSE_LENGTH,
    RESPONSE_TRUNCATED,
    ROW_HASH,
    SHIFTED,
    EncodedRows,
    cached,
)
from aligndistil.data.encoded_source import Progress, encode_source, prompt_hash, some, sources_of
from aligndistil.data.encoding import Encoder
from aligndistil.data.formats import read_prompts
from aligndistil.data.records import Messages, Record
from aligndistil.data.report import DropReport, merge_reports
from aligndistil.data.row_store import STORE_VERSION
from aligndistil.data.sources import open_source
from aligndistil.data.templating import TEMPLATE_REASONS
from aligndistil.data.whole_set import Answers, remarks
from aligndistil.errors import UserError
from aligndistil.recipe import Data, Source
from aligndistil.recipe.sections import HeldOut

CACHE_VERSION = 2
"""Raised whenever the same rows give other tokens, so that older caches are not read."""
FAULTS_TOLERATED = 0.001
"""The share of rows that a fault of the boundary or the template may touch before the source is refused for it."""
ALIKE = 0.99
"""The share of rows that fail for one reason from which on the source is at fault, and no row."""
SHOWN = 60
"""Characters of a field that a refusal shows."""
NO_BOUNDARY = "the prompt's tokens are not the first tokens of the whole row"


@dataclass(frozen=True, slots=True)
class _Part:
    """A source, encoded, and which of its examples are used."""

    name: str
    encoded: EncodedRows
    used: NDArray[np.int64]
    report: DropReport


class Examples:
    """The examples of a section, by index. What they are is `kind`; see `load_examples`."""

    def __init__(self, kind: DataKind, parts: Sequence[_Part], weights: Sequence[float], seed: int) -> None:
        self.kind = kind
        self._parts = parts
        self._rows_each = 2 if kind is DataKind.PAIRS else 1
        self.report = merge_reports(part.report for part in parts)
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

    def lengths(self) -> NDArray[np.int64]:
        """(len, 2): tokens of each example's prompt, and of its response, a pair's longer one."""
        found = np.zeros((len(self), 2), np.int64)
        for place, part in enumerate(self._parts):
            here = self._index[:, 0] == place
            rows = part.encoded.rows[:, (PROMPT_LENGTH, RESPONSE_LENGTH)].reshape(-1, self._rows_each, 2)
            found[here] = rows.max(1, initial=0)[self._index[here, 1]]
        return found

    def answers(self) -> Answers:
        """What tells the examples apart, before weights repeat or sub-sample them."""
        each = self._rows_each
        hashes = [part.encoded.hashes.reshape(-1, each, 2)[part.used] for part in self._parts]
        labels = [(_flags(part.encoded)[part.used] & DESIRABLE) > 0 for part in self._parts]
        keys = [(part.name, part.encoded.origins[part.used]) for part in self._parts]
        return Answers(self.kind, np.concatenate(hashes), np.concatenate(labels), keys)

    def shared_with(self, other: Examples) -> int:
        """How many examples have a row (prompt and response) that is one of the other's too."""
        known = np.unique(other.answers().hashes[:, :, ROW_HASH])
        return int(np.isin(self.answers().hashes[:, :, ROW_HASH], known).any(1).sum())

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
    template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Examples:
    """The examples of `section.train` or `section.eval` that an objective whose data are `kind` is given.

    Call it before there is a process group. A source's `weight` is how often an epoch sees its examples: 2 sees each
    twice, 0.25 sees a quarter of them, drawn once by `seed`; sources of different size are not made equal.
    `template_kwargs` is the recipe's `model.chat_template_kwargs`.

    Raises:
        UserError: a source is not there, does not fit the objective, has more than `max_dropped_fraction` rows that
            cannot be used or none that can, its prompts have no clean boundary, the chat template does not write what
            the rows say, or unpaired training data has one label only.
        ServiceError: the Hub failed.
        ValueError: the section has no such part.
    """
    sources = sources_of(section, which)
    if not sources:
        raise ValueError(f"the section has no data.{which}")
    encoder = Encoder(
        tokenizer,
        stop_ids=stop_ids,
        max_prompt_length=section.max_prompt_length,
        max_response_length=section.max_response_length,
        template_kwargs=template_kwargs or {},
        overlong_prompts=section.overlong_prompts,
    )
    parts: list[_Part] = []
    for source in sources:
        read = sum(part.report.rows_read for part in parts)
        part = _load_part(section, which, source, kind, encoder, _counting_on(on_progress, read))
        # Sources may share path and split, and differ in columns: their rows are others.
        repeated = sum(other.name == part.name or other.name.startswith(f"{part.name}(") for other in parts)
        parts.append(replace(part, name=f"{part.name}({repeated + 1})") if repeated else part)
    held = section.held_out
    if held is not None and not any(len(part.used) for part in parts):
        side = "out of the evaluation" if which == "eval" else "in the training"
        raise UserError(
            f"data.eval.fraction: {held.fraction:g} of the {parts[0].report.held_out} examples leaves none {side} "
            "data; give another fraction or seed, or more rows"
        )
    # Held-out examples are for measuring: each counts once.
    weights = [1.0 if which == "eval" and held is not None else source.weight for source in sources]
    examples = Examples(kind, parts, weights, seed)
    answers = examples.answers()
    if which == "train":
        _refuse_one_class(answers)
    examples.report.notes += [*filter(None, [encoder.mode()]), *remarks(answers)]
    return examples


def eval_prompts(section: Data) -> Iterator[Record]:
    """The prompts of `data.eval`, as `read_prompts` gives those of a source."""
    for source in sources_of(section, "eval"):
        yield from prompts_of(source, "eval", section.held_out)


def prompts_of(source: Source, which: Literal["train", "eval"], held: HeldOut | None) -> Iterator[Record]:
    """The prompts of one side of a source, all of them where none is held out. Raises UserError as `read_prompts`."""
    for record in read_prompts(source):
        if held is None or is_held_out(record.prompt, held) == (which == "eval"):
            yield record


def is_held_out(prompt: str | Messages, held: HeldOut) -> bool:
    """Whether a prompt is kept for evaluation: a function of its text, the seed and the fraction alone."""
    return bool(_held_out(np.array([prompt_hash(prompt)], np.uint64), held)[0])


def _held_out(prompts: NDArray[np.uint64], held: HeldOut) -> NDArray[np.bool_]:
    """By hashes of prompts. The seed goes through the mixing of SplitMix64, or seeds of like bits would draw alike."""
    mixed = prompts + np.uint64((held.seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(min(int(held.fraction * 2**64), 2**64 - 1))


def _counting_on(on_progress: Progress | None, read: int) -> Progress | None:
    return None if on_progress is None else lambda done, total: on_progress(read + done, read + total)


def _load_part(
    section: Data, which: str, source: Source, kind: DataKind, encoder: Encoder, on_progress: Progress | None
) -> _Part:
    reverse = section.reverse_preferences
    # All that says how rows are read; how often they are seen is no part of them.
    read_as = source.model_dump(mode="json", exclude={"path", "revision", "weight"})
    opened = open_source(source)
    content = [CACHE_VERSION, STORE_VERSION, opened.content, read_as, str(kind), reverse, encoder.fingerprint()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    encoded = cached(
        key,
        lambda: encode_source(
            source, opened, kind, encoder, reverse=reverse, workers=section.workers, on_progress=on_progress
        ),
    )
    side = "train" if section.held_out else which
    where = f"data.{side}: {source.path}, split {source.split}"
    used, report = _select(encoded, str(section.on_boundary_mismatch), where)
    if opened.skipped:  # not of what is stored, for a file that is not read does not change it
        report.notes.append(f"not read: {some(opened.skipped)}")
    _refuse_faults_of_the_template(report, where)
    _refuse_dropped(report, section.max_dropped_fraction, where, opened.rows)
    if section.held_out:
        on_this_side = _held_out(encoded.prompts[used], section.held_out) == (which == "eval")
        used, report.held_out = used[on_this_side], int((~on_this_side).sum())
        report.used = len(used)
    _count_rows(report, encoded, used)
    return _Part(f"{source.path}#{source.split}", encoded, used, report)


def _select(encoded: EncodedRows, on_mismatch: str, where: str) -> tuple[NDArray[np.int64], DropReport]:
    """The examples to use, after `on_boundary_mismatch`, and the report of the source."""
    report = DropReport(rows_read=encoded.rows_read, left_out=encoded.left_out, notes=list(encoded.notes))
    for reason, counted in encoded.dropped.items():
        report.dropped[reason] = replace(counted)
    count = len(encoded.origins)
    shifted = (_flags(encoded)[:, 0] & SHIFTED) > 0
    if on_mismatch == "error" and shifted.sum() > FAULTS_TOLERATED * count:
        named = DropReport()
        for number in encoded.origins[shifted].tolist():
            named.drop(NO_BOUNDARY, number)
        raise UserError(
            f"{where}: {named.reasons()} of {count}: the tokenizer merges the end of the prompt with the beginning of "
            "the response, or the chat template rewrites the conversation (as one that opens <think> in the prompt and "
            "not in the answer); look at them with `aligndistil validate "
            "--rows 3`, and set data.on_boundary_mismatch to shift (the boundary moves into the prompt) or drop"
        )
    if on_mismatch == "drop":
        for number in encoded.origins[shifted].tolist():
            report.drop(NO_BOUNDARY, number)
    used = np.flatnonzero(~shifted) if on_mismatch == "drop" else np.arange(count)
    report.used = len(used)
    return used, report


def _flags(encoded: EncodedRows) -> NDArray[np.int64]:
    """(E, rows of an example)."""
    count = len(encoded.origins)
    return encoded.rows[:, FLAGS].reshape(count, -1) if count else np.zeros((0, 1), dtype=np.int64)


def _count_rows(report: DropReport, encoded: EncodedRows, used: NDArray[np.int64]) -> None:
    flags = _flags(encoded)[used]
    report.truncated_prompts = int(((flags[:, 0] & PROMPT_TRUNCATED) > 0).sum())
    report.truncated_responses = int(((flags & RESPONSE_TRUNCATED) > 0).sum())
    report.shifted = int(((flags[:, 0] & SHIFTED) > 0).sum())


def _refuse_faults_of_the_template(report: DropReport, where: str) -> None:
    named = DropReport(dropped={r: d for r, d in report.dropped.items() if r.startswith(TEMPLATE_REASONS)})
    if named.dropped_count > FAULTS_TOLERATED * (report.used + report.dropped_count):
        raise UserError(
            f"{where}: {named.dropped_count} of {report.used + report.dropped_count} rows are not what was written "
            f"once they have been through the chat template: {named.reasons()}; if the rows are final text already, "
            "write `templated: true` beside the source's path, and else mend them or set model.chat_template or "
            "model.chat_template_kwargs"
        )


def _refuse_dropped(report: DropReport, allowed: float, where: str, rows: Dataset) -> None:
    total = report.used + report.dropped_count
    beginning = f"{where}: {report.dropped_count} of {total} examples cannot be used"
    if report.dropped_fraction <= allowed and report.used:
        return
    if not report.dropped:
        raise UserError(f"{where}: no example is left, since no row is desirable; give another source")
    reason, most = max(report.dropped.items(), key=lambda item: item[1].count)
    if most.count > ALIKE * total:
        raise UserError(
            f"{where}: {most.count} of {total} examples fail alike: {reason}; {_shown(rows, most.rows[0])}; name "
            "other columns with `columns`, or mend the rows"
        )
    if report.used == 0:
        raise UserError(f"{beginning} and none is left: {report.reasons()}; give another source")
    raise UserError(
        f"{beginning}, more than data.max_dropped_fraction ({allowed:g}): {report.reasons()}; mend the rows, or raise "
        "data.max_dropped_fraction"
    )


def _shown(rows: Dataset, number: int) -> str:
    """A row as a person knows it, cut to one line."""
    row = rows[number - 1]
    fields = [f"{name}: {_cut(json.dumps(value, ensure_ascii=False, default=str))}" for name, value in row.items()]
    return f"row {number} has the columns {{{', '.join(fields)}}}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refuse_one_class(answers: Answers) -> None:
    if answers.kind is not DataKind.UNPAIRED or len(set(answers.labels.ravel().tolist())) == 2:
        return
    all_of, no = ("desirable", "undesirable") if answers.labels.any() else ("undesirable", "desirable")
    raise UserError(
        f"data.train: all {len(answers.labels)} examples are {all_of} and none is {no}, and the objective learns from "
        "the difference of the two; look at the column `label`, or add a source with the others"
    )


def _take(used: NDArray[np.int64], weight: float, seed: int, place: int) -> NDArray[np.int64]:
    """`used` as often as the weight says: whole copies, then a random part, in order."""
    copies = int(weight)
    extra = round((weight - copies) * len(used))
    if copies == 0:
        extra = max(1, extra)
    drawn = np.random.default_rng([seed, place]).permutation(len(used))[:extra]
    return np.concatenate([np.tile(used, copies), used[np.sort(drawn)]])
