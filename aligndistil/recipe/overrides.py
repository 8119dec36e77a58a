"""`--set a.b=c`: as if it had been written in the recipe, at that place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aligndistil.errors import UserError
from aligndistil.recipe.merging import merge
from aligndistil.recipe.nearest import guess_and_list
from aligndistil.recipe.yaml_positions import COMMAND_LINE, KeyPath, Node, dotted, parse_value


def apply_overrides(tree: Node, overrides: Sequence[str]) -> Node:
    """The tree with all overrides in their order: the last one wins. Raises UserError."""
    for index, text in enumerate(overrides):
        tree = _apply(tree, text, index)
    return tree


def _apply(tree: Node, text: str, index: int) -> Node:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{COMMAND_LINE} {text}: write it as KEY=VALUE, for example `{COMMAND_LINE} train.seed=1`")
    if not value.strip():
        raise UserError(f"{COMMAND_LINE} {text}: there is no value after `=`; write `null` to switch a default off")
    if parts[0] == "extends":
        raise UserError(f"{COMMAND_LINE} {text}: `extends` cannot be set; it belongs in the file")
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in parts)
    _refuse_unknown_stage(tree, path, text)
    tree = _with_inherited_list(tree, path)
    new = parse_value(value, path, index)
    return merge(tree, _overlay(tree, path, new, text))


def _refuse_unknown_stage(tree: Node, path: KeyPath, text: str) -> None:
    if path[0] != "stages" or len(path) < 3:
        return
    stages = tree.child("stages")
    if stages is None or stages.mapping is None:
        instead = text.split(".", 2)[2]
        raise UserError(f"{COMMAND_LINE} {text}: this recipe has no `stages`; write `{COMMAND_LINE} {instead}`")
    if path[1] not in stages.mapping:
        hint = guess_and_list(str(path[1]), stages.mapping, "stages")
        raise UserError(f"{COMMAND_LINE} {text}: no stage is named `{path[1]}`{hint}")


def _with_inherited_list(tree: Node, path: KeyPath) -> Node:
    """Gives a stage its own copy of a recipe-wide list, so that one item of it can be set for the stage alone."""
    index = next((i for i, key in enumerate(path) if isinstance(key, int)), None)
    if path[0] != "stages" or index is None or tree.find(path[:index]) is not None:
        return tree
    inherited = tree.find(path[2:index])
    return tree if inherited is None else merge(tree, _overlay(tree, path[:index], inherited, dotted(path)))


def _overlay(node: Node, path: KeyPath, new: Node, text: str) -> Node:
    """What to merge over `node` so that `new` stands at `path`: one branch, or a whole list with one item changed."""
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if not isinstance(key, int) or key >= len(items):
            raise UserError(
                f"{COMMAND_LINE} {text}: `{dotted(node.path)}` is a list of {len(items)}; "
                f"`{key}` must be an index from 0 to {len(items) - 1}"
            )
        items[key] = merge(items[key], _overlay(items[key], rest, new, text) if rest else new)
        return replace(node, value=items)
    if isinstance(key, int):
        raise UserError(
            f"{COMMAND_LINE} {text}: `{key}` would be the index of a list, "
            f"but `{dotted(node.path)}` is not a list; leave it out"
        )
    if not rest:
        return replace(node, value={key: new})
    child = node.child(key)
    if child is None or not isinstance(child.value, dict | list):
        child = Node({}, new.at, new.at, (*node.path, key))
    return replace(node, value={key: _overlay(child, rest, new, text)})
