"""`aligndistil objectives`: what each objective computes and reads, and its fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from aligndistil.errors import for_console


def objectives_table(described: Sequence[dict[str, Any]]) -> Table:
    """Name, paper, data, models, rollout and fields of each objective."""
    table = Table("objective", "", box=SIMPLE_HEAD, show_lines=True)
    for one in described:
        models = ", ".join(f"{role} ({need})" for role, need in one["models"].items())
        fields = "\n".join(f"[cyan]{key}[/] = {_field(field)}" for key, field in one["fields"].items())
        facts = {"paper": one["paper"], "data": one["data"], "models": models, "on-policy": one["on_policy"]}
        lines = [
            f"[bold]{for_console(one['summary'])}[/]",
            *(f"{key}: {value}" for key, value in facts.items()),
            fields,
        ]
        table.add_row(f"[bold]{one['name']}[/]", "\n".join(line for line in lines if line))
    return table


def _field(field: dict[str, Any]) -> str:
    return for_console(f"{json.dumps(field['default'])}  {field['description']}")
