"""The tables of benchmarks/README.md, each between two markers."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).with_name("README.md")


def replace_table(name: str, text: str) -> None:
    """Replace what is between the markers `name:begin` and `name:end` of the README."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def markdown(headers: tuple[str, ...], rows: list[tuple[str, ...]], texts: int = 1) -> str:
    """A table; the first `texts` columns are text, the others numbers."""
    aligned = "|" + "---|" * texts + "---:|" * (len(headers) - texts)
    return "\n".join(["| " + " | ".join(headers) + " |", aligned, *("| " + " | ".join(row) + " |" for row in rows)])
