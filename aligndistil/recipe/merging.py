"""How two layers of a recipe become one: a file over the file it extends, a stage over the recipe-wide sections."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.objectives.base import Role
from aligndistil.recipe.yaml_positions import KeyPath, Node, parse_yaml, read_text

NOT_INHERITED = ("name", "output_dir")
"""Through `extends`: two recipes that shared them would write over each other's run folder."""
INSTEAD_OF = {"epochs": "max_steps", "max_steps": "epochs"}
"""A layer that gives one of the two takes away the other of the layer below."""
PATH_KEYS = {"path", "chat_template", "deepspeed", "kl_to", *(role for role in Role)}
FREE_FORM = {"deepspeed"}
"""Not ours to read: a null in there is a value."""


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings merge, everything else replaces. Null replaces too, see `without_nulls`."""
    below, above = base.mapping, over.mapping
    if below is None or above is None:
        return over
    kept = {key: child for key, child in below.items() if not _taken_away(key, above)}
    merged = {key: _merged_child(key, kept[key], child) if key in kept else child for key, child in above.items()}
    return replace(over, value=kept | merged)


def _taken_away(key: str, above: dict[str, Node]) -> bool:
    other = above.get(INSTEAD_OF.get(key, ""))
    return other is not None and other.value is not None and key not in above


def _merged_child(key: str, base: Node, over: Node) -> Node:
    if key == "objective":
        old, new = base.child("name"), over.child("name")
        if old is not None and new is not None and old.value != new.value:
            return over  # the hyperparameters of another objective are nobody's defaults
    return merge(base, over)


def without_nulls(node: Node) -> Node:
    """A null field or section is as if it had never been written."""
    if isinstance(node.value, dict):
        kept = {
            key: child if key in FREE_FORM else without_nulls(child)
            for key, child in node.value.items()
            if child.value is not None
        }
        return replace(node, value=kept)
    if isinstance(node.value, list):
        return replace(node, value=[without_nulls(child) for child in node.value])
    return node


def read_recipe_tree(path: Path) -> tuple[Node, str]:
    """The tree of a recipe file merged over the files it extends, and the text of the file itself."""
    return _read(path, read_text(path), ())


def _read(path: Path, text: str, above: tuple[Path, ...]) -> tuple[Node, str]:
    node = parse_yaml(text, str(path))
    if node.value is None:
        raise UserError(f"{path}: the file is empty; `aligndistil recipes ls` lists recipes to start from")
    if node.mapping is None:
        raise UserError(f"{node.value_at}: a recipe is a mapping of keys, such as `model:` and `objective:`")
    node = _with_paths_of_file(node, path.parent)
    assert node.mapping is not None
    extends = node.mapping.pop("extends", None)
    if extends is None or extends.value is None:
        return node, text
    if not isinstance(extends.value, str):
        raise UserError(f"{extends.value_at}: extends: must be the path of one recipe, not {extends.plain()!r}")
    base = _read_base(Path(os.path.normpath(path.parent / extends.value)), extends, (*above, path))
    return merge(base, node), text


def _read_base(path: Path, extends: Node, above: tuple[Path, ...]) -> Node:
    if path.resolve() in [p.resolve() for p in above]:
        circle = " -> ".join(str(p) for p in (*above, path))
        raise UserError(f"{extends.value_at}: extends: recipes extend each other in a circle: {circle}")
    if not path.is_file():
        raise UserError(
            f"{extends.value_at}: extends: no such file: {path} (the path is relative to the recipe that extends it)"
        )
    base, _ = _read(path, read_text(path), above)
    assert base.mapping is not None
    return replace(base, value={key: child for key, child in base.mapping.items() if key not in NOT_INHERITED})


def _with_paths_of_file(node: Node, folder: Path) -> Node:
    """A path that starts with `./` or `../` is relative to the recipe's folder; what comes out still looks local."""
    if isinstance(node.value, dict):
        return replace(node, value={key: _with_paths_of_file(child, folder) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[_with_paths_of_file(child, folder) for child in node.value])
    if isinstance(node.value, str) and _names_a_path(node.path) and node.value.startswith(("./", "../")):
        path = os.path.normpath(folder / node.value)
        return replace(node, value=path if path.startswith(("/", "..")) else f"./{path}")
    return node


def _names_a_path(path: KeyPath) -> bool:
    return bool(path) and path[-1] in PATH_KEYS
