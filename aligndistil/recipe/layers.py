"""How the layers of a recipe become one: a file over the file it extends, `--set` over both, a stage over what stands
above `stages`."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from aligndistil.errors import UserError, guess_and_list
from aligndistil.objectives import roles
from aligndistil.recipe.yaml_positions import COMMAND_LINE, KeyPath, Node, dotted, parse_value, parse_yaml, read_text

NOT_INHERITED = ("name", "output_dir")
"""Through `extends`: two recipes that shared them would write over each other's run folder."""
INSTEAD_OF = {"epochs": "max_steps", "max_steps": "epochs"}
"""A layer that gives one of the two takes away the other of the layer below."""
PATH_KEYS = ("path", "chat_template", "deepspeed", "kl_to", "judge", "against", "benchmark_files")
"""Keys whose values are paths, beside the roles of models."""
FREE_FORM = ("deepspeed",)
"""DeepSpeed's own configuration: a null in there is a value."""


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings merge, everything else replaces. Null replaces too, see `without_nulls`."""
    below, above = base.mapping, over.mapping
    if below is None or above is None:
        return over
    merged = dict(below)
    for key, child in above.items():
        other = INSTEAD_OF.get(key)
        if other is not None and other in merged and other not in above and child.value is not None:
            del merged[other]
        if key not in merged:
            merged[key] = child
            continue
        merged[key] = child if _of_another_kind(key, merged[key], child) else merge(merged[key], child)
    return replace(over, value=merged)


def _of_another_kind(key: str, below: Node, above: Node) -> bool:
    """Whether it is another objective, or other evaluation data, whose fields below are nobody's defaults."""
    if key == "objective":
        old, new = below.child("name"), above.child("name")
        return old is not None and new is not None and old.value != new.value
    if key == "eval":
        was_share, is_share = below.child("fraction") is not None, above.child("fraction") is not None
        return was_share != is_share and (is_share or above.child("path") is not None)
    return False


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


def read_recipe_tree(path: Path, above: tuple[Path, ...] = ()) -> tuple[Node, str]:
    """The tree of a recipe file merged over the files it extends, and the text of the file itself.

    `above` are the files that extend it. Raises UserError for a file that is not there or is no recipe.
    """
    text = read_text(path)
    node = parse_yaml(text, str(path))
    if node.value is None:
        raise UserError(f"{path}: the file is empty; `aligndistil recipes ls` lists recipes to start from")
    if node.mapping is None:
        raise UserError(f"{node.value_at}: a recipe is a mapping of keys, such as `model:` and `objective:`")
    node = _with_paths_of_file(node, path.parent, {*PATH_KEYS, *roles()})
    own = dict(node.mapping or {})
    extends = own.pop("extends", None)
    node = replace(node, value=own)
    if extends is None or extends.value is None:
        return node, text
    at = f"{extends.value_at}: extends:"
    if not isinstance(extends.value, str):
        raise UserError(f"{at} must be the path of one recipe, not {extends.plain()!r}")
    extended, above = Path(os.path.normpath(path.parent / os.path.expanduser(extends.value))), (*above, path)
    if extended.resolve() in [one.resolve() for one in above]:
        circle = " -> ".join(str(one) for one in (*above, extended))
        raise UserError(f"{at} recipes extend each other in a circle: {circle}")
    if not extended.is_file():
        raise UserError(f"{at} no such file: {extended} (the path is relative to the recipe that extends it)")
    base, _ = read_recipe_tree(extended, above)
    inherited = {key: child for key, child in (base.mapping or {}).items() if key not in NOT_INHERITED}
    return merge(replace(base, value=inherited), node), text


def _with_paths_of_file(node: Node, folder: Path, keys: Set[str]) -> Node:
    """A path that starts with `./` or `../` is relative to the recipe's folder; what comes out still looks local."""
    if isinstance(node.value, dict):
        return replace(node, value={key: _with_paths_of_file(child, folder, keys) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[_with_paths_of_file(child, folder, keys) for child in node.value])
    if isinstance(node.value, str) and node.path and node.path[-1] in keys and node.value.startswith(("./", "../")):
        path = os.path.normpath(folder / node.value)
        return replace(node, value=path if path.startswith(("/", "..")) else f"./{path}")
    return node


def with_home(node: Node) -> Node:
    """The tree with the home folder for each `~` that begins a path."""
    if isinstance(node.value, dict):
        return replace(node, value={key: with_home(child) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[with_home(child) for child in node.value])
    is_path = node.path and node.path[-1] in {*PATH_KEYS, "output_dir", *roles()}
    if is_path and isinstance(node.value, str) and node.value.startswith("~"):
        return replace(node, value=os.path.expanduser(node.value))
    return node


def apply_overrides(tree: Node, overrides: Sequence[str]) -> Node:
    """The tree with each `--set KEY=VALUE` as if it had been written there: the last one wins. Raises UserError."""
    for index, text in enumerate(overrides):
        said = f"{COMMAND_LINE} {text}:"
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"{said} write it as KEY=VALUE, for example `{COMMAND_LINE} train.seed=1`")
        if not value.strip():
            raise UserError(f"{said} there is no value after `=`; write `null` to switch a default off")
        if parts[0] == "extends":
            raise UserError(f"{said} `extends` cannot be set; it belongs in the file")
        path: KeyPath = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts)
        if path[0] == "stages" and len(path) > 2:
            tree = _for_a_stage(tree, path, text)
        tree = merge(tree, _overlay(tree, path, parse_value(value, path, index), said))
    return tree


def _for_a_stage(tree: Node, path: KeyPath, text: str) -> Node:
    """The tree in which the stage that an override names has its own copy of the list that it sets an item of."""
    said, stages = f"{COMMAND_LINE} {text}:", tree.child("stages")
    if stages is None or stages.mapping is None:
        instead = text.split(".", 2)[2]
        raise UserError(f"{said} this recipe has no `stages`; write `{COMMAND_LINE} {instead}`")
    if path[1] not in stages.mapping:
        hint = guess_and_list(str(path[1]), stages.mapping, "stages")
        raise UserError(f"{said} no stage is named `{path[1]}`{hint}")
    index = next((i for i, key in enumerate(path) if isinstance(key, int)), None)
    if index is None or tree.find(path[:index]) is not None:
        return tree
    inherited = tree.find(path[2:index])
    return tree if inherited is None else merge(tree, _overlay(tree, path[:index], inherited, said))


def _overlay(node: Node, path: KeyPath, new: Node, said: str) -> Node:
    """What to merge over `node` so that `new` stands at `path`: one branch, or a whole list with one item changed."""
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if not isinstance(key, int) or key >= len(items):
            raise UserError(
                f"{said} `{dotted(node.path)}` is a list of {len(items)}; "
                f"`{key}` must be an index from 0 to {len(items) - 1}"
            )
        items[key] = merge(items[key], _overlay(items[key], rest, new, said) if rest else new)
        return replace(node, value=items)
    if isinstance(key, int):
        raise UserError(
            f"{said} `{key}` would be the index of a list, but `{dotted(node.path)}` is not a list; leave it out"
        )
    if not rest:
        return replace(node, value={key: new})
    child = node.child(key)
    if child is None or not isinstance(child.value, dict | list):
        child = Node({}, new.at, new.at, (*node.path, key))
    return replace(node, value={key: _overlay(child, rest, new, said)})
