"""YAML whose every key and value remembers where it was written.

The parser is ruamel.yaml's. What a plain scalar means is decided here: `1e-6` is a float, dates and `1:30` are strings.
The booleans of YAML 1.1 (`yes`, `no`, `on`, `off`), a key written twice, tags and merge keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from aligndistil.errors import UserError, shortened

KeyPath: TypeAlias = tuple[str | int, ...]

COMMAND_LINE = "--set"
_DEEPEST, _MOST = 50, 50_000
"""Levels and values of a recipe, aliases written out."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where something was written: a file with line and column from 1, or the command line."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return self.source if self.source.startswith(COMMAND_LINE) else f"{self.source}:{self.line}:{self.column}"

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Sorts positions in file order, the command line last."""
        return (self.source == COMMAND_LINE, self.source, self.line, self.column)


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its origin. Mappings hold nodes, lists hold nodes, scalars are plain."""

    value: Any
    """dict[str, Node], list[Node], str, int, float, bool or None."""
    at: Position
    """Of the key, of the list item, or of the document."""
    value_at: Position
    path: KeyPath = ()
    """As written: `("stages", "dpo", "train", "seed")`. A merge keeps it."""

    @property
    def mapping(self) -> dict[str, Node] | None:
        return self.value if isinstance(self.value, dict) else None

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node under a key or an index, or None. A mapping is its own item 0: one source is a list of one."""
        if isinstance(self.value, dict):
            return self if key == 0 else self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            item: Node = self.value[key]
            return item
        return None

    def deepest(self, path: Iterable[str | int]) -> tuple[Node, KeyPath]:
        """The deepest node that exists on a path, and the rest of the path."""
        node, path = self, tuple(path)
        for i, key in enumerate(path):
            child = node.child(key)
            if child is None:
                return node, path[i:]
            node = child
        return node, ()

    def find(self, path: Iterable[str | int]) -> Node | None:
        """The node at a path, or None."""
        node, rest = self.deepest(path)
        return None if rest else node

    def where(self, path: Iterable[str | int]) -> str:
        """`recipes/x.yaml:12:7: stages.dpo.model.path`; what was not written is placed where its section was."""
        found, rest = self.deepest(path)
        shown = dotted((*found.path, *rest))
        at = found.at if rest else found.value_at
        return f"{at}: {shown}" if shown else str(found.at)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        if isinstance(self.value, dict | list):
            for child in self.value.values() if isinstance(self.value, dict) else self.value:
                yield from child.walk()


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises UserError when there is none, or when it is not UTF-8."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_yaml(text: str, source: str) -> Node:
    """The document of a text; null when it is empty. Raises UserError with file, line and column."""
    parser = YAML(typ="safe", pure=True)
    parser.Composer = _Composer
    try:
        document = parser.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Position(source, mark.line + 1, mark.column + 1) if mark else source
        parts = [part for part in (error.problem, error.context) if part]
        said = ", ".join(reversed(parts)) if parts[0].startswith("but ") else " ".join(parts)
        said = re.sub(r"\('(.*)',\)", r"'\1'", said)  # some of the parser's messages show a tuple of one
        raise UserError(f"{at}: this is not valid YAML: {said}") from None
    except YAMLError as error:
        place = getattr(error, "position", None)
        before = text[: place if isinstance(place, int) else 0]
        at = Position(source, before.count("\n") + 1, len(before) - before.rfind("\n")) if before else source
        raise UserError(f"{at}: this is not valid YAML: {str(error).splitlines()[0]}") from None
    except (OverflowError, ValueError):
        raise UserError(f"{source}: an escape such as \\U names no character of Unicode; write another") from None
    except RecursionError:
        raise UserError(f"{source}: lists and mappings are nested too deeply here for a recipe") from None
    start = Position(source, 1, 1)
    return _converted(document, source, start, (), (), count()) if document is not None else Node(None, start, start)


def parse_value(text: str, path: KeyPath, index: int) -> Node:
    """The value of the `index`-th `--set`, typed as YAML."""
    at = Position(COMMAND_LINE, index)

    def moved(node: Node, path: KeyPath) -> Node:
        value = node.value
        if isinstance(value, dict):
            value = {key: moved(child, (*path, key)) for key, child in value.items()}
        elif isinstance(value, list):
            value = [moved(child, (*path, i)) for i, child in enumerate(value)]
        return Node(value, at, at, path)

    return moved(parse_yaml(text, f"{COMMAND_LINE} {dotted(path)}"), path)


class _Composer(Composer):
    """Refuses what a composed node no longer shows: that it had a tag, or an anchor that was there before."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.parser.peek_event()
        problem = None
        if getattr(event, "ctag", None) is not None:
            problem = f"tags (here {str(event.ctag)!r}) are not supported; write the value plainly"
        elif isinstance(event, NodeEvent) and not isinstance(event, AliasEvent) and event.anchor in self.anchors:
            problem = f"the anchor {event.anchor!r} was already given; give this one another name"
        if problem:
            raise MarkedYAMLError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def _converted(
    node: Any, source: str, at: Position | None, path: KeyPath, above: tuple[Any, ...], values: Iterator[int]
) -> Node:
    here = _position(node, source)
    if any(node is other for other in above):
        raise UserError(f"{here}: {dotted(path)}: this anchor contains itself")
    if len(above) > _DEEPEST:
        raise UserError(f"{here}: lists and mappings are nested too deeply here for a recipe")
    if next(values) > _MOST:
        raise UserError(f"{here}: this file has more than {_MOST:,} values, as aliases (`*`) repeat them; write fewer")
    value: Any
    if isinstance(node, MappingNode):
        value = {}
        for key_node, value_node in node.value:
            key_at = _position(key_node, source)
            key = _key(key_node, key_at)
            if key in value:
                first = value[key].at
                text = f"this key was already given at {first}; remove one of them"
                raise UserError(f"{key_at}: {dotted((*path, key))}: {text}")
            value[key] = _converted(value_node, source, key_at, (*path, key), (*above, node), values)
    elif isinstance(node, SequenceNode):
        value = [
            _converted(item, source, None, (*path, i), (*above, node), values) for i, item in enumerate(node.value)
        ]
    else:
        value = _scalar(node, here)
    return Node(value, at or here, here, path)


def _position(node: Any, source: str) -> Position:
    return Position(source, node.start_mark.line + 1, node.start_mark.column + 1)


def _key(node: Any, at: Position) -> str:
    if not isinstance(node, ScalarNode):
        raise UserError(f"{at}: a key must be a word, not a list or a mapping")
    if node.value == "<<" and not node.style:
        raise UserError(f"{at}: merge keys (`<<`) are not supported; use `extends`, or sections above `stages`")
    value = _scalar(node, at)
    if not isinstance(value, str):
        raise UserError(f"{at}: the key `{node.value}` is not a string; write it in quotes")
    return value


def _scalar(node: ScalarNode, at: Position) -> str | int | float | bool | None:
    text: str = node.value
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{at}: {text!r} holds half a character; write the whole one")
    if "\0" in text:
        raise UserError(f"{at}: {text!r} holds the character NUL, which no name may hold; remove it")
    if node.style:  # in quotes, or a block
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    word = text.lower() if text in (text.lower(), text.upper(), text.capitalize()) else ""
    if word in ("true", "false"):
        return word == "true"
    if word in ("yes", "no", "on", "off"):
        meant = "true" if word in ("yes", "on") else "false"
        raise UserError(
            f"{at}: `{text}` is a boolean to some YAML readers and a word to others; "
            f'write `{meant}`, or "{text}" in quotes'
        )
    if re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)*", text) and len(text) < 400:
        if abs(number := int(text)) >= 2**63:
            raise UserError(f"{at}: {shortened(text)} is too large for a whole number")
        return number
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        if not math.isfinite(float(text)):
            raise UserError(f"{at}: {shortened(text)} is too large for a number")
        return float(text)
    return text
