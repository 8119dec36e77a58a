"""What files and prompts of several benchmarks have in common."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aligndistil.benchmarks.base import Answer, Benchmark
from aligndistil.errors import UserError
from aligndistil.files import write_text


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its `{name}`s replaced; braces in the values, and others in the template, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def answer_id(model: str, turns: Sequence[str]) -> str:
    """The same for the same answer of a model."""
    return hashlib.sha256(json.dumps([model, *turns]).encode()).hexdigest()[:22]


def json_lines(content: bytes, where: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises UserError when it is something else."""
    lines = []
    for number, line in enumerate(content.split(b"\n"), 1):  # not `splitlines`: it splits strings at U+2028 as well
        if line.strip():
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UserError(f"{where}:{number}: this is no JSON object; give a file of JSON lines")
            lines.append(found)
    return lines


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The same of a file that a person names."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from None
    return json_lines(content, path)


def write_json_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these, in one step."""
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def complete(
    answers: Mapping[str, Answer], ids: set[str], benchmark: Benchmark, where: str | Path
) -> dict[str, Answer]:
    """The answers to a benchmark's questions, out of a file that may hold those that a limit leaves out.

    Raises UserError when one is to a question that is not among all its `ids`, or a question has none.
    """
    if unknown := [id for id in answers if id not in ids]:
        raise UserError(f"{where}: {benchmark.title} has no question {unknown[0]!r}; give answers to its own questions")
    wanted = [question.id for question in benchmark.questions]
    if missing := [id for id in wanted if id not in answers]:
        raise UserError(
            f"{where}: {len(missing)} of the {len(wanted)} questions of {benchmark.title} have no answer "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); answer all of them"
        )
    return {id: answers[id] for id in wanted}


def json_rows(content: bytes, name: str) -> list[dict[str, Any]]:
    """A list of JSON objects. Raises UserError, which begins with the `name`, when it is something else."""
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UserError(f"{name} is not a JSON list of objects")
    return rows
