"""docs/adding-an-objective.md, done as it says: a package of its own, its test, its recipe."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/adding-an-objective.md").read_text()


def block(kind: str, beginning: str) -> str:
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install .` of the tutorial's package leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "shiny_objectives.py").write_text(block("python", '"""Identity'))
    project = tomllib.loads(block("toml", "[project]"))["project"]
    info = folder / "shiny_objectives-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "ipo.yaml").write_text(block("yaml", "name: ipo"))
    (folder / "test_ipo.py").write_text(block("python", "import torch"))
    return folder


def run(site: Path, *arguments: str) -> str:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=site, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_objective_of_another_package_is_listed_with_its_fields(site: Path) -> None:
    (ipo,) = [one for one in json.loads(run(site, "aligndistil", "objectives", "--json")) if one["name"] == "ipo"]
    assert ipo["data"] == "pairs"
    assert ipo["models"] == {"policy": "logp", "reference": "logp"}
    assert ipo["fields"]["tau"]["default"] == 0.1
    assert "regularisation" in ipo["fields"]["tau"]["description"]
    assert "rewards/margins" in ipo["metrics"]


def test_its_recipe_is_checked_and_trains(site: Path) -> None:
    assert "ipo" in run(site, "aligndistil", "validate", "ipo.yaml")
    settings = ["train.max_steps=3", "train.learning_rate=3e-4", "train.warmup_ratio=0", "report.samples=2"]
    settings += ["evaluation.limit=8", "data.eval.limit=8", "data.train.limit=16"]  # the same batch at every step
    run(site, "aligndistil", "train", "ipo.yaml", *(part for one in settings for part in ("--set", one)))
    lines = [json.loads(line) for line in (site / "runs/ipo/ipo/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[0] == pytest.approx(25.0, rel=0.01)  # (1 / (2 x 0.1))² where policy and reference are the same
    assert losses[-1] < losses[0]
    (ipo,) = [one for one in json.loads(run(site, "aligndistil", "objectives", "--json")) if one["name"] == "ipo"]
    assert all(ipo["metrics"].keys() <= line.keys() for line in lines)


def test_the_tests_of_the_tutorial_pass(site: Path) -> None:
    assert "2 passed" in run(site, "pytest", "-q", "-p", "no:cacheprovider", "test_ipo.py")
