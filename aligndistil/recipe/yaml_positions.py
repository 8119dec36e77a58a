"""YAML whose every key and value remembers where it was written.

What differs from PyYAML's `safe_load`: `1e-6` is a float, a key written twice is refused, and so are the booleans of
YAML 1.1 (`yes`, `no`, `on`, `off`), tags and merge keys. Dates and `1:30` are strings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from aligndistil.errors import UserError

KeyPath: TypeAlias = tuple[str | int, ...]

COMMAND_LINE = "--set"

_NULL, _BOOL, _INT, _FLOAT, _OLD_BOOL, _MERGE = "null", "bool", "int", "float", "old_bool", "merge"
_STRING = "tag:yaml.org,2002:str"


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

    def find(self, path: Iterable[str | int]) -> Node | None:
        """The node at a path, or None."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def deepest(self, path: KeyPath) -> tuple[Node, KeyPath]:
        """The deepest node that exists on a path, and the rest of the path."""
        node = self
        for i, key in enumerate(path):
            child = node.child(key)
            if child is None:
                return node, path[i:]
            node = child
        return node, ()

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        children = self.value.values() if isinstance(self.value, dict) else self.value
        if isinstance(self.value, dict | list):
            for child in children:
                yield from child.walk()


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        tag = event.tag if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) else None
        if tag is not None:
            problem = f"tags (here {tag!r}) are not supported; write the value plainly"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", [*"~nN", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    (_OLD_BOOL, r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", [*"yYnNoO"]),
    (_INT, r"[-+]?[0-9]+(_[0-9]+)*", [*"-+0123456789"]),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    (_MERGE, r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


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
    try:
        loader = _Loader(text)
        document = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Position(source, mark.line + 1, mark.column + 1) if mark else source
        said = " ".join(part for part in (error.problem, error.context) if part)
        raise UserError(f"{at}: this is not valid YAML: {said}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: this is not valid YAML: {str(error).splitlines()[0]}") from None
    start = Position(source, 1, 1)
    return _converted(document, source, start, (), ()) if document is not None else Node(None, start, start)


def parse_value(text: str, path: KeyPath, index: int) -> Node:
    """The value of the `index`-th `--set`, typed as YAML."""
    parsed = parse_yaml(text, f"{COMMAND_LINE} {dotted(path)}")
    return _moved(parsed, Position(COMMAND_LINE, index), path)


def _moved(node: Node, at: Position, path: KeyPath) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _moved(child, at, (*path, key)) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_moved(child, at, (*path, i)) for i, child in enumerate(value)]
    return Node(value, at, at, path)


def _position(node: yaml.Node, source: str) -> Position:
    return Position(source, node.start_mark.line + 1, node.start_mark.column + 1)


def _converted(node: yaml.Node, source: str, at: Position, path: KeyPath, above: tuple[yaml.Node, ...]) -> Node:
    here = _position(node, source)
    if node in above:
        raise UserError(f"{here}: {dotted(path)}: this anchor contains itself")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        return Node(_mapping(node, source, path, above), at, here, path)
    if isinstance(node, yaml.SequenceNode):
        items = [
            _converted(item, source, _position(item, source), (*path, i), above) for i, item in enumerate(node.value)
        ]
        return Node(items, at, here, path)
    return Node(_scalar(node, here), at, here, path)


def _mapping(node: yaml.MappingNode, source: str, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, Node]:
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        at = _position(key_node, source)
        key = _key(key_node, at)
        if key in children:
            raise UserError(
                f"{at}: {dotted((*path, key))}: this key was already given at {children[key].at}; remove one of them"
            )
        children[key] = _converted(value_node, source, at, (*path, key), above)
    return children


def _key(node: yaml.Node, at: Position) -> str:
    if node.tag == _MERGE:
        raise UserError(f"{at}: merge keys (`<<`) are not supported; use `extends`, or sections above `stages`")
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{at}: a key must be a word, not a list or a mapping")
    value = _scalar(node, at)
    if not isinstance(value, str):
        raise UserError(f"{at}: the key `{node.value}` is not a string; write it in quotes")
    return value


def _scalar(node: yaml.Node, at: Position) -> str | int | float | bool | None:
    text: str = node.value
    match node.tag:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            if not math.isfinite(float(text)):
                raise UserError(f"{at}: {text} is too large for a number")
            return float(text)
        case "old_bool":
            meant = "true" if text.lower() in ("yes", "on") else "false"
            raise UserError(
                f"{at}: `{text}` is a boolean to some YAML readers and a word to others; "
                f'write `{meant}`, or "{text}" in quotes'
            )
        case _:
            return text
