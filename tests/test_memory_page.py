"""docs/memory.md is what its script writes."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_on_memory_is_what_the_dry_run_says() -> None:
    spec = importlib.util.spec_from_file_location("memory_page", ROOT / "scripts/memory_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page()
