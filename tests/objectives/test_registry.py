from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aligndistil.objectives import GROUP, registry

OBJECTIVE = '''
from typing import Literal
from aligndistil.batch import DataKind
from aligndistil.objectives.base import Need, Objective, Role

class Other(Objective):
    """Another objective."""

    data = DataKind.RESPONSES
    paper = "none"
    name: Literal["{name}"] = "{name}"

    @property
    def needs(self):
        return {{Role.POLICY: Need.LOGP}}
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package with one objective of this name."""

    def install(name: str) -> None:
        module = f"other_objective_{name}"
        (tmp_path / f"{module}.py").write_text(OBJECTIVE.format(name=name))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:Other\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        registry.cache_clear()

    yield install
    registry.cache_clear()


def test_the_registry_knows_the_files_of_its_folder_by_name() -> None:
    assert {"sft", "dpo", "aligndistil"} <= set(registry())
    assert list(registry()) == sorted(registry())
    for name, cls in registry().items():
        assert cls.example().name == name
        assert cls.describe()["name"] == name


def test_every_field_of_every_objective_is_described() -> None:
    for cls in registry().values():
        described = cls.describe()
        assert described["summary"]
        assert all(field["description"] for field in described["fields"].values()), described["name"]


def test_an_objective_of_another_package_is_found(install: Callable[[str], None]) -> None:
    install("another")
    assert registry()["another"].describe()["summary"] == "Another objective."


def test_two_objectives_of_one_name_are_refused(install: Callable[[str], None]) -> None:
    install("dpo")
    with pytest.raises(ValueError, match=r"two objectives are named 'dpo': aligndistil.objectives.dpo and other_"):
        registry()
