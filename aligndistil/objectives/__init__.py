"""The registry: every module of this folder, and every entry point of the group `aligndistil.objectives`.

Adding an objective edits nothing: a new file here, or an entry point of another package that names its class, is found.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from aligndistil.objectives.base import Objective
from aligndistil.objectives.types import ROLES

GROUP = "aligndistil.objectives"


@functools.cache
def registry() -> dict[str, type[Objective]]:
    """Objective classes by name, sorted. Raises ValueError when two classes share a name."""
    modules = (f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__) if m.name != "base")
    found = [cls for name in modules for cls in _classes_of(importlib.import_module(name))]
    found += [point.load() for point in entry_points(group=GROUP)]
    by_name: dict[str, type[Objective]] = {}
    for cls in found:
        name = cls.model_fields["name"].default
        if by_name.setdefault(name, cls) is not cls:
            raise ValueError(f"two objectives are named {name!r}: {by_name[name].__module__} and {cls.__module__}")
    return dict(sorted(by_name.items()))


def roles() -> dict[str, str]:
    """Every role that a recipe's `models` may name, and what it is: those of `Role`, and those objectives add."""
    return ROLES | {role: text for cls in registry().values() for role, text in cls.roles.items()}


def _classes_of(module: Any) -> list[type[Objective]]:
    """Those that the module defines and that have a name; a base of several has none."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Objective)
        and value.__module__ == module.__name__
        and not value.model_fields["name"].is_required()
    ]
