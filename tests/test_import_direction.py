"""Imports point one way, and what belongs to one place stays there. The layers are those of docs/architecture.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import aligndistil

ROOT = Path(aligndistil.__file__).parent
REPOSITORY = Path(__file__).parents[1]
TABLE = "the table of layers in docs/architecture.md"


def layers_of(page: str) -> list[list[str]]:
    """The modules of each row of its table of layers: those of a row import from the rows above alone."""
    section = page.split("\n## Layers\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", section, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    return [re.findall(r"`(\w+)/?`", modules) for _, modules in rows]


LAYERS = layers_of((REPOSITORY / "docs" / "architecture.md").read_text())
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names} | {"__init__": 0, "__main__": 99}

HEAVY = {"transformers", "deepspeed", "datasets", "accelerate", "peft", "matplotlib", "tensorboard"}


def part_of(file: Path) -> str:
    """`engine` for aligndistil/engine/config.py, `batch` for aligndistil/batch.py."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of everything that a file in `package` imports, wherever in the file it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(name for name in (above, node.module) if name)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_arrows(file: Path, source: str) -> list[str]:
    """A sentence for each import that points the wrong way."""
    here = part_of(file)
    package = ("aligndistil", *file.relative_to(ROOT).parent.parts)
    wrong = [] if here in LAYER else [f"{here}: add this module to {TABLE}"]
    for name in imported(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] != "aligndistil" or len(parts) == 1 or parts[1] == here or here not in LAYER:
            continue
        there = parts[1]
        if there.startswith("__"):
            continue  # aligndistil.__version__
        if there not in LAYER:
            wrong.append(f"{here} imports {there}: add it to {TABLE}")
        elif LAYER[there] >= LAYER[here]:
            wrong.append(f"{file.relative_to(ROOT)}: {here} must not import {there}, which is beside or below it")
    return wrong


def forbidden_packages(file: Path, source: str) -> list[str]:
    """A sentence for each outside package that this file leaves to another."""
    here = part_of(file)
    names = list(imported(ast.parse(source), ()))
    roots = {name.split(".")[0] for name in names}
    wrong = []
    if here in ("maths", "batch", "objectives", "recipe", "errors"):
        wrong += [f"{here} must not import {root}" for root in sorted(roots & HEAVY)]
    trackers = here == "run_folder" and "tracker" in file.stem
    if not trackers and any("tensorboard" in name.split(".") for name in names):
        wrong.append(f"{file.relative_to(ROOT)}: only the trackers of run_folder import tensorboard")
    return wrong


def asks_for_a_name(source: str) -> list[int]:
    """Lines that compare the name of an objective with something."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            compared = [node.subject]
        else:
            continue
        lines += [node.lineno for side in compared if is_objective_name(side)]
    return lines


def is_objective_name(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Attribute) and node.attr == "name"):
        return False
    owner = node.value
    return (isinstance(owner, ast.Name) and "objective" in owner.id) or (
        isinstance(owner, ast.Attribute) and "objective" in owner.attr
    )


FILES = sorted(file for file in ROOT.rglob("*.py"))


def test_the_layers_are_of_every_module_once() -> None:
    listed = [name for names in LAYERS for name in names]
    assert sorted(listed) == sorted({part_of(file) for file in FILES} - {"__init__", "__main__"})


def test_the_file_tree_of_the_readme_goes_from_the_top_layer_to_the_lowest() -> None:
    tree = (REPOSITORY / "README.md").read_text().split("## What is where")[1].split("\n    recipes/")[0]
    names = re.findall(r"^      (\w+)(?:/|\.py)\s", tree, flags=re.MULTILINE)
    assert {*names} == {name for layer in LAYERS for name in layer}
    assert names == sorted(names, key=lambda name: -LAYER[name])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    assert wrong_arrows(file, file.read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_outside_packages_are_imported_where_they_belong(file: Path) -> None:
    assert forbidden_packages(file, file.read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_outside_the_objectives_asks_which_objective_it_has(file: Path) -> None:
    if part_of(file) != "objectives":
        assert asks_for_a_name(file.read_text()) == []


def test_objectives_do_not_import_each_other() -> None:
    folder = ROOT / "objectives"
    own = {file.stem for file in folder.glob("*.py")} - {"base", "types", "metrics", "actor_critic", "__init__"}
    for file in folder.glob("*.py"):
        for name in imported(ast.parse(file.read_text()), ("aligndistil", "objectives")):
            parts = name.split(".")
            others = own - {file.stem}
            assert not (parts[:2] == ["aligndistil", "objectives"] and len(parts) > 2 and parts[2] in others), name


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("maths.py", "from aligndistil.objectives import registry"),
        ("objectives/new.py", "from aligndistil.recipe import Stage"),
        ("objectives/new.py", "from ..recipe import Stage"),
        ("data/new.py", "import aligndistil.models.load"),
        ("data/new.py", "def f():\n    from aligndistil import engine"),
        ("recipe/new.py", "if TYPE_CHECKING:\n    import aligndistil.cli"),
        ("commands/new.py", "from aligndistil.cli import app"),
        ("nonsense.py", ""),
        ("cli.py", "from aligndistil.nonsense import x"),
    ],
)
def test_a_wrong_arrow_would_be_found(file: str, source: str) -> None:
    assert len(wrong_arrows(ROOT / file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("training/new.py", "from aligndistil.data import x\nfrom aligndistil.engine.config import y"),
        ("data/new.py", "from . import records\nfrom .records import x\nimport torch"),
        ("engine/new.py", "from aligndistil import __version__\nimport aligndistil"),
    ],
)
def test_a_right_arrow_is_allowed(file: str, source: str) -> None:
    assert wrong_arrows(ROOT / file, source) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("objectives/new.py", "import transformers.utils"),
        ("objectives/new.py", "def f():\n    from deepspeed import zero"),
        ("training/loop.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("run_folder/metrics.py", "from torch.utils import tensorboard"),
    ],
)
def test_a_misplaced_package_would_be_found(file: str, source: str) -> None:
    assert len(forbidden_packages(ROOT / file, source)) == 1


def test_the_trackers_may_import_tensorboard() -> None:
    assert (
        forbidden_packages(ROOT / "run_folder/trackers.py", "from torch.utils.tensorboard import SummaryWriter") == []
    )


@pytest.mark.parametrize(
    "source",
    [
        'if objective.name == "dpo": pass',
        'if stage.objective.name != "dpo": pass',
        'x = 1 if self.objective.name in ("dpo", "aligndistil") else 2',
        'if "dpo" == objective.name: pass',
        'match stage.objective.name:\n    case "dpo": pass',
    ],
)
def test_asking_for_the_name_would_be_found(source: str) -> None:
    assert asks_for_a_name(source) == [1]


def test_printing_the_name_is_allowed() -> None:
    assert asks_for_a_name("print(stage.objective.name, stage.name == 'dpo')") == []
