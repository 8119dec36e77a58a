"""The recipes that travel with the package: finding, listing, showing and copying them."""

from __future__ import annotations

import shutil
from filecmp import cmp
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.table import Table

from aligndistil.errors import UserError, nearest

if TYPE_CHECKING:  # torch comes with it, which `recipes ls` does without
    from aligndistil.recipe import Recipe

SCHEMA = "schema.json"


def recipes_folder() -> Path:
    """Inside an installed package, or beside it in a checkout."""
    package = Path(str(files("aligndistil")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipes by the name that `recipes cp` and `train` take: their path without the suffix."""
    folder = recipes_folder()
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """A file as it is; otherwise a shipped recipe of that name. Raises UserError when there is neither."""
    if path.is_file():
        return path
    recipes = shipped_recipes()
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in recipes:
        return recipes[name]
    raise UserError(f"there is no recipe {str(path)!r}{_nearest(name, path)}")


def _nearest(name: str, path: Path) -> str:
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(str(path), beside) or nearest(name, shipped_recipes())
    return (
        f"; did you mean {near[0]!r}?" if near else "; `aligndistil recipes ls` lists those that come with the package"
    )


def recipes_table() -> Table:
    """Name and first sentence of each shipped recipe."""
    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for name, path in shipped_recipes().items():
        table.add_row(name, headline(path))
    return table


def headline(path: Path) -> str:
    """The first comment of a recipe that is not for an editor."""
    comments = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")


def resolved_text(recipe: Recipe) -> str:
    """The recipe as YAML that extends nothing and relies on no default."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=120)


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a shipped recipe, what it extends and the schema, keeping their places relative to each other.

    Raises UserError for an unknown name, and rather than overwriting a file.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        raise UserError(f"there is no shipped recipe {name!r}{_nearest(name, Path(name))}")
    if target.suffix in (".yaml", ".yml"):
        raise UserError(f"{target}: give a folder to copy to; recipes keep their names, since others may extend them")
    root = recipes_folder().resolve()
    sources = [*_with_extended(recipes[name].resolve()), root / SCHEMA]
    copies = {source: target / source.relative_to(root) for source in sources}
    for source, copy in copies.items():
        changed = copy.exists() and (copy.is_dir() or source == recipes[name].resolve() or not cmp(source, copy, False))
        if changed and copy.name != SCHEMA:
            raise UserError(f"{copy} exists already; move it away or copy to another folder")
    for source, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return list(copies.values())


def _with_extended(path: Path) -> list[Path]:
    extended = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("extends")
    return [path] if extended is None else [path, *_with_extended((path.parent / extended).resolve())]
