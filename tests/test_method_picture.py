"""The picture of the method is drawn from its formulas, and the one in docs/ is what the script draws."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

matplotlib = pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
NAMES = ["method-light.svg", "method-dark.svg"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_picture", ROOT / "scripts/method_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(script: ModuleType, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    return {path.name: path.read_bytes() for path in script.draw(folder)}


def test_both_pictures_are_drawn_with_the_same_bytes_each_time(script, tmp_path):
    first, second = drawn(script, tmp_path / "first"), drawn(script, tmp_path / "second")
    assert first == second
    assert [*first] == NAMES
    for svg in first.values():
        words = " ".join(re.findall(r"<!-- (.*?) -->", svg.decode(), flags=re.DOTALL))  # glyphs are paths
        assert [word for word in ("reverse DPO", "teacher", "policy") if word not in words] == []
        assert b"<dc:date>" not in svg


def test_pictures_in_docs_are_the_drawn_ones(script, tmp_path):
    pin = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin is not None
    if matplotlib.__version__ != pin[1]:
        pytest.skip(f"drawn with matplotlib {pin[1]}")
    assert drawn(script, tmp_path / "drawn") == {name: (ROOT / "docs" / name).read_bytes() for name in NAMES}
