"""Which columns a source has, under our names, and which of the known formats they make."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Audio, ClassLabel, Dataset, Image, Value, Video

from aligndistil.batch import DataKind
from aligndistil.data.records import SCORE_KEYS, Record, Unusable, common_prefix, is_hh, read_label, to_records
from aligndistil.data.sources import load_rows
from aligndistil.data.turns import MEDIA, looks_like_turns, turns_or_text
from aligndistil.errors import UserError, nearest
from aligndistil.recipe import Source

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": (),
    "input": (),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response", "rejected_messages"),
    "completion": (),
    "label": ("kto_tag",),
    "messages": ("conversations", "conversation", "dialogue", "dialog"),
    "responses": ("completions", "answers"),
    "scores": (),
    "preferred": ("better_response_id", "winner", "choice"),
    "system": ("system_prompt", "system_message"),
    "history": (),
    "tools": (),
}
"""Our names, and the other names under which a column is also found."""
CONTEXT = ("system", "history", "tools")
"""Columns that every format may have."""
NUMBERED = {
    "response_": re.compile(r"(?:response|answer|completion)_?(\d+|[ab])"),
    "score_": re.compile(r"(?:score|rating)_?(\d+|[ab])"),
}
"""Columns that are there once for each of several answers: our name without the number, and how theirs look."""


@dataclass(frozen=True, slots=True)
class Way:
    """Columns that make a format."""

    format: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join(self.needed)


WAYS = (
    Way("preference", ("chosen", "rejected"), ("prompt", "input", "messages")),
    Way("preference", ("messages", "rejected")),
    Way("hh", ("chosen", "rejected"), ("prompt",)),
    Way("unpaired", ("prompt", "completion", "label"), ("input",)),
    Way("unpaired", ("messages", "label")),
    Way("preference", ("responses",), ("scores", "preferred", "prompt", "input", "messages")),
    Way("demonstrations", ("messages",)),
    Way("demonstrations", ("prompt", "completion"), ("input",)),
    Way("prompts", ("prompt",), ("input",)),
)
"""The first that fits is the one `auto` takes; whether strings are HH-RLHF's is seen in the rows."""
FEEDS = {
    "preference": frozenset(DataKind),
    "hh": frozenset(DataKind),
    "unpaired": frozenset({DataKind.UNPAIRED, DataKind.RESPONSES, DataKind.PROMPTS}),
    "demonstrations": frozenset({DataKind.RESPONSES, DataKind.PROMPTS}),
    "prompts": frozenset({DataKind.PROMPTS}),
}
"""Format -> the kinds of example its rows can give."""
KIND_NEEDS = {
    DataKind.PAIRS: ("prompt", "chosen", "rejected"),
    DataKind.RESPONSES: ("prompt", "completion"),
    DataKind.UNPAIRED: ("prompt", "completion", "label"),
    DataKind.PROMPTS: ("prompt",),
}
"""The kind of example -> columns that give it, for a message."""
LOOKED_AT = 1000
"""How many rows are looked at where column names do not say what a column holds."""
NOTHING: tuple[Any, ...] = (None, "", [], "[]", "null", '""')
"""What an empty cell holds, as it is stored: a column of mixed types is JSON text."""
# fmt: off
METADATA = frozenset({
    "author", "category", "dataset", "date", "hash", "id", "ids", "idx", "index", "key", "label", "lang",
    "language", "license", "model", "name", "origin", "rating", "score", "source", "split", "subset", "tag", "task",
    "timestamp", "topic", "type", "url", "uuid", "version",
})
# fmt: on
"""The last word in the name of a column that says something about its row."""
FEW_CHARACTERS = 3
FEW_WORDS = 2
GUESSES = {
    "chosen": {"chosen", "better", "best", "good", "pos", "positive", "accepted", "preferred", "j"},
    "rejected": {"rejected", "worse", "worst", "bad", "neg", "negative", "dispreferred", "k"},
    "prompt": {"prompt", "question", "instruction", "query", "problem", "user", "request", "history"},
    "input": {"input", "context"},
    "completion": {"completion", "response", "output", "answer", "target", "solution"},
}
"""Our name -> words in the name of a column that may be meant."""
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxlevel = 40, 40, 16, 2, 4


def find_columns(source: Source, rows: Dataset) -> dict[str, str]:
    """Our column name -> theirs, for the columns that are read. `pos.answer` is a field of the column `pos`.

    Columns that are there once for each answer are called `response_0`, `score_0` and so on.

    Raises UserError when `columns` maps a name we do not know, or to a column that is not there, and when a column
    holds images, sound or video.
    """
    for ours, theirs in source.columns.items():
        _check_mapping(source, rows, ours, theirs)
    for theirs in {*source.columns.values()} - {""}:
        if len(twice := [ours for ours, one in source.columns.items() if one == theirs]) > 1:
            raise UserError(
                f"data source {source.path}: columns.{twice[0]} and columns.{twice[1]} are both {theirs}; name two"
            )
    _refuse_media(source, rows)
    found = _find(source, rows)
    way = _way(source, found)
    if way is None:
        return found
    read = {*way.needed, *way.optional} - ({"messages"} - {*way.needed} if "prompt" in found else set())
    if source.templated:
        read.discard("input")
    else:
        read.update(CONTEXT)
    return {ours: theirs for ours, theirs in found.items() if _family(ours) in read}


def find_format(source: Source, columns: Mapping[str, str], rows: Dataset) -> str:
    """The format of a source: what it says, or what its columns, and for HH-RLHF most of its first rows, show.

    Raises UserError when the columns make no known format, or not the one that is named; when the rows have no prompt
    column and what would be taken for one; and when a label can mean two things.
    """
    named, way = str(source.format), _way(source, columns)
    if way is None and named != "auto":
        ways = " or ".join(str(way) for way in WAYS if way.format == named)
        raise UserError(
            f"data source {source.path}: format {named} needs the columns {ways}, and the rows have "
            f"{_listed(rows.column_names)}{_row_and_mapping(rows)}"
        )
    if way is None:
        formats = dict.fromkeys(way.format for way in WAYS if way.format != "hh")
        known = "; ".join(f"{name}: {' or '.join(str(w) for w in WAYS if w.format == name)}" for name in formats)
        raise UserError(
            f"data source {source.path}: the columns {_listed(rows.column_names)} make no known format ({known})"
            f"{_row_and_mapping(rows)}"
        )
    _refuse_fields(source, columns, rows)
    _refuse_class_labels(source, columns, rows)
    if way.format == "unpaired":
        _refuse_labels(source, _values(rows, columns["label"]), _all_values(rows, columns["label"]))
    if "chosen" in way.needed and named == "auto":
        read = {ours: columns[ours] for ours in ("prompt", "chosen") if ours in columns}
        hh = [is_hh(row) for row in _first_rows(rows, read)]
        if sum(hh) * 2 > len(hh):
            return "hh"
    if way.format == "preference" and "messages" not in way.needed:
        _refuse_missing_prompt(source, columns, rows)
    return way.format


def check_feeds(source: Source, layout: str, kind: DataKind, rows: Dataset, *, reverse: bool) -> None:
    """Raises UserError when rows of this format cannot give the examples that the objective learns from."""
    if kind not in FEEDS[layout]:
        able = ", ".join(name for name, kinds in FEEDS.items() if kind in kinds)
        raise UserError(
            f"data source {source.path}: the objective eats {kind}, which {layout} rows do not give; use a source of "
            f"format {able}{_row_and_mapping(rows, KIND_NEEDS[kind])}"
        )
    if reverse and layout == "demonstrations" and kind is DataKind.RESPONSES:
        raise UserError(
            f"data source {source.path}: data.reverse_preferences cannot reverse demonstrations; leave it out"
        )


def under_our_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The values of a raw row under our names; None for a field that it does not have."""
    return {ours: row[theirs] if theirs in row else _field(row, theirs) for ours, theirs in columns.items()}


def read_columns(columns: Mapping[str, str], present: Sequence[str]) -> list[str]:
    """The columns of a source that have to be decoded, in the order they are there."""
    read = {_column(theirs, present) for theirs in columns.values()}
    return [name for name in present if name in read]


def unread_columns(columns: Mapping[str, str], present: Sequence[str]) -> list[str]:
    """The columns of a source that nothing reads, in the order they are there."""
    read = set(read_columns(columns, present))
    return [name for name in present if name not in read]


def read_prompts(source: Source) -> Iterator[Record]:
    """The prompts of a source, row by row, before any token; rows that training leaves out are left out.

    Raises UserError when the source cannot be read, or its columns make no known format.
    """
    rows = load_rows(source)
    columns = find_columns(source, rows)
    layout = find_format(source, columns, rows)
    for row in rows.select_columns(read_columns(columns, rows.column_names)):
        try:
            yield from to_records(under_our_names(row, columns), layout, DataKind.PROMPTS, templated=source.templated)
        except Unusable:
            continue


def _family(name: str) -> str:
    """`responses` for `response_0`, `scores` for `score_0`."""
    return next((f"{prefix[:-1]}s" for prefix in NUMBERED if name.startswith(prefix)), name)


def _way(source: Source, columns: Iterable[str]) -> Way | None:
    names = {_family(name) for name in columns}
    fitting = (way for way in WAYS if source.format in ("auto", way.format) and names.issuperset(way.needed))
    return next(fitting, None)


def _check_mapping(source: Source, rows: Dataset, ours: str, theirs: str) -> None:
    present = rows.column_names
    if _family(ours) not in COLUMNS and not (theirs == "" and ours in present):
        raise UserError(
            f"data source {source.path}: columns.{ours} is none of {', '.join(COLUMNS)}, response_0, score_0, ..."
        )
    if theirs in ("", *present):
        return
    column = _column(theirs, present)
    fields = {path: None for value in _values(rows, column) for path in _fields(column, value)} if column else {}
    if theirs not in fields and not any(value is not None for value in _values(rows, theirs)):
        there = list(fields) or present
        raise UserError(
            f"data source {source.path}: columns.{ours} names {theirs!r}, which is not there; the nearest is "
            f"{''.join(nearest(theirs, there, cutoff=0.0))!r} of {_listed(there)}"
        )


def _refuse_media(source: Source, rows: Dataset) -> None:
    for name in _media(rows):
        # The table is asked, for a row would decode the picture.
        held = (value.as_py() for chunk in rows.data.column(name).chunks for value in chunk)
        if name not in source.columns and any(value not in NOTHING for value in held):
            raise UserError(
                f"data source {source.path}: the column {name} is not text, and models here read text alone; give rows "
                f'without it, or set `columns: {{{name}: ""}}` to use the text of the rows without it'
            )


def _media(rows: Dataset) -> list[str]:
    def holds(feature: Any) -> bool:
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
        return isinstance(feature, Image | Audio | Video) or (inner is not None and holds(inner))

    return [name for name, feature in rows.features.items() if name.lower() in MEDIA or holds(feature)]


def _find(source: Source, rows: Dataset) -> dict[str, str]:
    """Our name -> theirs, for every column that is mapped to one of our names, or is known to have it."""
    mapped = {*source.columns, *source.columns.values()}
    left = [name for name in rows.column_names if name not in mapped]
    found = {ours: theirs for ours, theirs in source.columns.items() if theirs}
    for ours, others in COLUMNS.items():
        names = [name for name in (ours, *others) if name in left and _holds(ours, name, rows)]
        if names and ours not in source.columns:
            found[ours] = names[0]
    for prefix, pattern in NUMBERED.items():
        for name, match in ((name, pattern.fullmatch(name)) for name in left):
            if match is not None:
                found.setdefault(prefix + match[1], name)
    if {"instruction", "output"} <= {*left} and not found.keys() & {"prompt", "chosen", "completion", "messages"}:
        found |= {"prompt": "instruction", "completion": "output"}
    # Beside a prompt, an input may be anything; beside an instruction it is what the instruction is about.
    if found.get("prompt") != "instruction" and "input" not in source.columns:
        found.pop("input", None)
    return _ranked(found, rows)


def _holds(ours: str, theirs: str, rows: Dataset) -> bool:
    """Whether a column of that name holds what we call so; asked where the name alone does not say it."""
    if ours == "messages" and theirs not in ("messages", "conversations"):
        return all(_turns(value) for value in _values(rows, theirs))
    if ours == "label" and "completion" not in rows.column_names:
        return any(_is_label(value) for value in _values(rows, theirs))
    return ours != "responses" or all(isinstance(value, list) for value in _values(rows, theirs))


def _ranked(found: dict[str, str], rows: Dataset) -> dict[str, str]:
    """Without answers of which nothing says which is better."""
    numbers = [name.removeprefix("response_") for name in found if name.startswith("response_")]
    numbered = len(numbers) > 1 and ("preferred" in found or all(f"score_{number}" in found for number in numbers))
    lists = found.keys() & {"scores", "preferred"} or (
        "responses" in found and _scored(_values(rows, found["responses"]))
    )
    return {
        name: theirs
        for name, theirs in found.items()
        if not (name.startswith(tuple(NUMBERED)) and not numbered) and not (name == "responses" and not lists)
    }


def _scored(values: list[Any]) -> bool:
    answers = (answer for value in values if isinstance(value, list) for answer in value)
    return any(isinstance(answer, Mapping) and answer.keys() & {*SCORE_KEYS} for answer in answers)


def _turns(value: Any) -> list[Any]:
    """The turns of a conversation, and none when the value is something else."""
    try:
        turns = turns_or_text(value)
    except Unusable:
        return []
    return turns if looks_like_turns(turns) else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _turns(value)


def _is_label(value: Any) -> bool:
    try:
        read_label(value)
    except Unusable:
        return False
    return True


def _all_values(rows: Dataset, theirs: str) -> list[Any]:
    """The different values of a column of numbers or text; of the first rows where it is none."""
    plain = isinstance(rows.features.get(theirs), Value)
    return list(rows.unique(theirs)) if plain else _values(rows, theirs)


def _refuse_class_labels(source: Source, columns: Mapping[str, str], rows: Dataset) -> None:
    """Of a ClassLabel whose numbers, which rows have, mean something else than its names."""
    for ours, theirs in columns.items():
        feature = rows.features.get(theirs)
        if not isinstance(feature, ClassLabel) or ours not in ("label", "preferred"):
            continue
        means = _is_label_of if ours == "label" else _is_choice_of
        if not all(means(name, number) for number, name in enumerate(feature.names)):
            raise UserError(
                f"data source {source.path}: the column {theirs} has numbers for the names {_listed(feature.names)}, "
                f"which {ours} does not mean by them; write "
                f"{'true and false' if ours == 'label' else 'the numbers of the answers'}"
            )


def _is_label_of(name: str, number: int) -> bool:
    return _is_label(name) and number in (0, 1) and read_label(name) == read_label(number)


def _is_choice_of(name: str, number: int) -> bool:
    return name.rpartition("_")[2] == str(number)


def _refuse_labels(source: Source, values: list[Any], different: list[Any]) -> None:
    """Of labels that are all none, and of labels of which 0 may be neither good nor bad."""
    if values and not any(map(_is_label, values)):
        raise UserError(
            f"data source {source.path}: label is {values[0]!r}, none of true, false, 1, 0, -1; map the column that "
            'says whether a response is desirable, or leave this one unread with `columns: {label: ""}`'
        )
    if {"0", "-1"} <= {str(value).strip().removesuffix(".0") for value in different}:
        raise UserError(
            f"data source {source.path}: label is -1 in some rows and 0 in others, and both mean undesirable; if 0 is "
            "neither, leave those rows out, else write one of them"
        )


def _refuse_fields(source: Source, columns: Mapping[str, str], rows: Dataset) -> None:
    """Of a column that holds fields where a text or messages are meant."""
    for ours in ("prompt", "chosen", "rejected", "completion"):
        value = next(iter(_values(rows, columns[ours])), None) if ours in columns else None
        if isinstance(value, Mapping) and value.get("role") is None and value.get("from") is None:
            texts = [path for path, inside in _fields(columns[ours], value).items() if isinstance(inside, str)]
            field = texts[0] if texts else f"{columns[ours]}.FIELD"
            raise UserError(
                f"data source {source.path}: the column {columns[ours]} holds the fields {_listed(list(value))}; name "
                f"the one with the text, as in `columns: {{{ours}: {field}}}`"
            )


def _refuse_missing_prompt(source: Source, columns: Mapping[str, str], rows: Dataset) -> None:
    """Of answers without a prompt while it may stand in another column: what they have in common would be taken for it.

    With `columns: {prompt: ""}` a person says that chosen and rejected begin with it.
    """
    ranked = "chosen" not in columns
    if columns.keys() & {"prompt", "messages"}:
        return
    if source.templated and not ranked:
        raise UserError(
            f"data source {source.path}: final text (`templated: true`) is not cut into prompt and answer: give the "
            "rows a column prompt, and in chosen and rejected what follows it"
        )
    if "prompt" in source.columns and not ranked:
        return
    answers = [answer for ours in columns for answer in _answers(ours, columns, rows)]
    alone = [len(answer) == 1 for answer in map(_turns, answers) if answer]
    if not (any(map(_is_text, answers)) or all(alone)):
        return
    texts = _texts(rows, [*unread_columns(columns, rows.column_names), *filter(None, [columns.get("history")])])
    if not texts and not ranked:
        _refuse_same_prompt(source, columns, rows)
    if texts:
        guessed = {ours: theirs for ours, theirs in _guess(texts).items() if ours in ("prompt", "input")}
        mapping = guessed if "prompt" in guessed else {"prompt": texts[0]}
        begins = "" if ranked else ', or set `columns: {prompt: ""}` if chosen and rejected do begin with it'
        raise UserError(
            f"data source {source.path}: the rows have no prompt column, and their answers need not begin with the "
            f"prompt; other columns with text are {_listed(texts)}: name the prompt, as in {_mapped(mapping)}{begins}"
        )


def _refuse_same_prompt(source: Source, columns: Mapping[str, str], rows: Dataset) -> None:
    """Of what most pairs begin with alike, which is no question."""
    begins = [chosen[: common_prefix(chosen, rejected)].strip() for chosen, rejected in _pairs_of_text(columns, rows)]
    most = max(begins, key=begins.count, default="")
    if most and len(begins) > 1 and begins.count(most) * 2 > len(begins):
        raise UserError(
            f"data source {source.path}: the rows have no prompt column, and most of their answers begin with "
            f"{_SHORT.repr(most)}, which is no prompt; name the column with the prompt, as in "
            "`columns: {prompt: YOURS}`"
        )


def _pairs_of_text(columns: Mapping[str, str], rows: Dataset) -> list[tuple[str, str]]:
    read = {ours: columns[ours] for ours in ("chosen", "rejected")}
    pairs = [(row["chosen"], row["rejected"]) for row in _first_rows(rows, read)]
    return [pair for pair in pairs if all(map(_is_text, pair))]


def _answers(ours: str, columns: Mapping[str, str], rows: Dataset) -> list[Any]:
    """The answers that a column holds, if it holds any: to choose from, or the chosen one."""
    if ours == "responses":
        return [answer for value in _values(rows, columns[ours]) if isinstance(value, list) for answer in value]
    return _values(rows, columns[ours]) if ours == "chosen" or _family(ours) == "responses" else []


def _texts(rows: Dataset, names: Iterable[str]) -> list[str]:
    """The columns and fields among these that hold text, or conversations, in one of the first rows."""
    found: dict[str, None] = {}
    for name in names:
        for value in _values(rows, name) if name not in _media(rows) else ():
            if _turns(value):
                found[name] = None
            for path, inside in ({} if _turns(value) else _fields(name, value)).items():
                # Fields of a column, and columns that are named like metadata, mostly are: they must read like text.
                words = re.split(r"[\W_]+", path.lower())
                asked = {*words} & GUESSES["prompt"] and isinstance(inside, str | int | float) and str(inside).strip()
                doubtful = path != name or words[-1] in METADATA
                long = isinstance(inside, str) and (
                    _words_in(inside) > FEW_WORDS if doubtful else len(inside.strip()) > FEW_CHARACTERS
                )
                if asked or long:
                    found[path] = None
    return list(found)


def _words_in(text: str) -> int:
    """Words; where a script has none between spaces, one for two characters."""
    return max(len(text.split()), sum(not character.isascii() for character in text) // 2)


def _guess(names: Iterable[str]) -> dict[str, str]:
    """Our name -> the column that may be meant, of which there is one at most."""
    words = {name: {*re.split(r"[\W_]+", name.lower())} for name in names}
    guessed: dict[str, str] = {}
    for ours, meant in GUESSES.items():
        fitting = [name for name in words if words[name] & meant and name not in guessed.values()]
        if fitting:
            guessed[ours] = fitting[0]
    return guessed


def _row_and_mapping(rows: Dataset, needed: Sequence[str] = ("prompt",)) -> str:
    """What a row looks like, and `columns` that may read it as what is needed, for the end of a message."""
    row = rows.select_columns([name for name in rows.column_names if name not in _media(rows)])[0]
    fields = {path: value for name in row for path, value in _fields(name, row[name]).items()}
    guessed = _guess(path for path, value in fields.items() if isinstance(value, str) or _turns(value))
    mapping = {ours: guessed.get(ours, "YOURS") for ours in needed} if len(needed) > 1 else guessed
    mapping = {ours: theirs for ours, theirs in mapping.items() if ours != theirs} or dict.fromkeys(needed, "YOURS")
    return f"; the first row is {_SHORT.repr(row)}; name the columns, as in {_mapped(mapping)}"


def _mapped(mapping: Mapping[str, str]) -> str:
    return "`columns: {" + ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items()) + "}`"


def _first_rows(rows: Dataset, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    used = rows.select_columns(read_columns(columns, rows.column_names))
    return (under_our_names(row, columns) for row in used.select(range(min(LOOKED_AT, len(rows)))))


def _values(rows: Dataset, theirs: str) -> list[Any]:
    """The values of a column, or field of one, in the first rows, without nulls."""
    return [row[theirs] for row in _first_rows(rows, {theirs: theirs}) if row[theirs] is not None]


def _column(theirs: str, present: Sequence[str]) -> str:
    """The column that a name, or the path of a field, is in."""
    return theirs if theirs in present else theirs.split(".")[0]


def _field(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _fields(path: str, value: Any) -> dict[str, Any]:
    """Path -> value, for a value and for what it holds."""
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    fields = {path: value}
    for step, one in inside:
        fields |= _fields(f"{path}.{step}", one)
    return fields


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(names) + "]"
