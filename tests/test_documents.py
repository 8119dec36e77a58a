"""What the documents say of the repository is true."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from aligndistil.objectives import registry
from aligndistil.objectives.base import Role

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def test_readme_shows_the_two_commands_first():
    installed = README.index("pip install -c constraints.txt .")
    assert README.index("make quickstart") < README.index("make test") < installed


def test_readme_file_tree_lists_every_module_and_nothing_else():
    tree = README.split("## What is where")[1].split("\n    recipes/")[0]
    listed = set(re.findall(r"^      ([\w.]+/?)\s", tree, flags=re.MULTILINE))
    package = ROOT / "aligndistil"
    hidden = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    there = {p.name + "/" * p.is_dir() for p in package.iterdir() if p.name not in hidden}
    assert listed == there


def test_readme_recipe_is_the_shipped_one():
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block.group(1)) == yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())


def shown(default):
    """As the table of an objective's page has it."""
    if isinstance(default, str):
        return default
    return "-" if default is None else str(default).lower() if isinstance(default, bool) else f"{default:g}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/objectives").glob("*.md")), ids=lambda page: page.stem)
def test_stages_on_an_objectives_page_name_what_it_needs_and_its_table_every_field(page):
    cls, text = registry()[page.stem], page.read_text()
    block = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None
    for stage in yaml.safe_load(block.group(1))["stages"].values():
        objective = cls.model_validate(stage["objective"])
        assert {*stage.get("models", {})} | {Role.POLICY} == {*objective.needs}
        assert objective.on_policy in (("optional", "always") if "rollout" in stage else ("never", "optional"))
    described = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, flags=re.MULTILINE))
    assert described == {name: shown(field["default"]) for name, field in cls.describe()["fields"].items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_versions_tested_with_are_ones_that_the_package_asks_for():
    text = (ROOT / "constraints.txt").read_text()
    pins = {name.lower().replace("_", "-"): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [Requirement(text) for text in (*project["project"]["dependencies"], *project["dependency-groups"]["dev"])]
    assert [str(one) for one in asked if one.name.lower() not in pins] == []
    assert [str(one) for one in asked if not one.specifier.contains(pins[one.name.lower()])] == []
