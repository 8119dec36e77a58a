"""What a registered objective owes: its declarations are true, and it has a page, a recipe and golden values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aligndistil.objectives import registry, roles
from aligndistil.objectives.base import Objective, OnPolicy, Prepares, Role, scalar_term
from aligndistil.objectives.loop_metrics import GOLD_REWARD, LOOP_METRICS
from aligndistil.recipe import load_recipe, recipe_schema
from support.micro_batches import loss_of, random_work
from support.objectives import EVERY_OBJECTIVE, named
from support.plain_formula import plain_preparation, plain_terms, preparation_terms

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(name for name, cls in registry().items() if cls.__module__.startswith("aligndistil.objectives."))


def measured(objective: Objective) -> set[str]:
    """Names of everything that the objective's preparation and loss measure."""
    work = random_work(objective)
    found = set[str]()
    if objective.prepares is not Prepares.NOTHING:
        found |= set(plain_preparation(objective, work.looked_at, work.before).metrics)
    loss = loss_of(objective, work)
    return found | set(loss.metrics) | set(loss.maxima)


def variants(cls: type[Objective]) -> list[Objective]:
    return [objective for objective in EVERY_OBJECTIVE if type(objective) is cls]


def lacking(name: str, cls: type[Objective], root: Path = ROOT) -> list[str]:
    """Everything that an objective of this repository lacks, in words."""
    lacks = []
    if not cls.__doc__:
        lacks.append(f"{name}: a docstring, whose first line is its summary")
    if not (root / "docs" / "objectives" / f"{name}.md").is_file():
        lacks.append(f"{name}: a page, docs/objectives/{name}.md")
    recipes = [load_recipe(path) for path in (root / "recipes" / "quickstart").glob("*.yaml")]
    if not any(isinstance(stage.objective, cls) for recipe in recipes for stage in recipe.stages.values()):
        lacks.append(f"{name}: a recipe that trains it in recipes/quickstart/")
    golden = [path.stem for path in (root / "tests" / "golden" / "cases").glob("*.json")]
    if not any(case == name or case.startswith(f"{name}_") or case.endswith(f"_{name}") for case in golden):
        lacks.append(f"{name}: golden values of loss and gradient, tests/golden/cases/{name}.json (see make.py there)")
    for field, info in cls.model_fields.items():
        if field != "name" and not info.description:
            lacks.append(f"{name}: a sentence under its field {field}")
    known = set(cls.metrics) | set(LOOP_METRICS) | set(GOLD_REWARD)
    lacks += [f"{name}: headline names {metric}, which is no metric" for metric in cls.headline if metric not in known]
    lacks += [f"{name}: a definition of its metric {m}" for m, info in cls.metrics.items() if not info.definition]
    return lacks


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_objective_lacks_nothing(name: str) -> None:
    assert lacking(name, registry()[name]) == []


def test_each_thing_that_is_lacking_is_named(tmp_path: Path) -> None:
    class Bare(Objective):
        name: str = "bare"
        strength: float = 1.0
        headline = ("nowhere",)

    Bare.__doc__ = None
    assert [text.removeprefix("bare: ").split(",")[0] for text in lacking("bare", Bare, tmp_path)] == [
        "a docstring",
        "a page",
        "a recipe that trains it in recipes/quickstart/",
        "golden values of loss and gradient",
        "a sentence under its field strength",
        "headline names nowhere",
    ]


@pytest.mark.parametrize("name", sorted(registry()))
def test_metrics_are_declared_just_as_they_are_measured(name: str) -> None:
    cls = registry()[name]
    assert {metric for objective in variants(cls) for metric in measured(objective)} == set(cls.metrics)


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE, ids=named)
def test_terms_and_roles_are_declared(objective: Objective) -> None:
    work = random_work(objective)
    terms = set(plain_terms(objective, work.batch, work.logits))
    if objective.prepares is not Prepares.NOTHING:
        terms |= set(preparation_terms(objective, work.looked_at, work.before))
    terms -= {scalar_term(role, need) for role, need in objective.needs.items() if need.is_scalar}
    assert set(objective.needs) - {Role.POLICY} <= set(roles())
    assert set(objective.update_needs) <= set(objective.needs)
    assert terms == set(objective.terms)
    assert objective.groups <= (objective.on_policy is OnPolicy.ALWAYS and objective.prepares is Prepares.ROLLOUT)


def test_one_name_means_one_thing_and_the_page_of_metrics_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "metrics_page.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_schema_of_recipes_is_current() -> None:
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == recipe_schema(), "run `make schema`"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_models_of_every_shipped_stage_are_those_its_objective_reads(path: Path) -> None:
    for stage in load_recipe(path).stages.values():
        assert set(stage.models) == set(stage.objective.needs) - {Role.POLICY}
