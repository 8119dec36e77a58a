"""From a file and its overrides to a checked recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aligndistil.objectives import registry
from aligndistil.objectives.base import Objective, OnPolicy, Prepares, Role
from aligndistil.recipe.checks import (
    check_batch,
    check_code,
    check_evaluation,
    check_kinds,
    check_preparation,
    check_teacher_cache,
    critic_allowed,
    models_needed,
    named_roles,
    rollout_allowed,
)
from aligndistil.recipe.describe import Problem, raise_all, unknown_key, validated
from aligndistil.recipe.graph import PREFIX, circle, ordered, references_of, unknown_stage
from aligndistil.recipe.header import Header
from aligndistil.recipe.merging import merge, read_recipe_tree, without_nulls
from aligndistil.recipe.nearest import guess_and_list, listed
from aligndistil.recipe.overrides import apply_overrides
from aligndistil.recipe.revisions import with_revisions
from aligndistil.recipe.sections import (
    SECTIONS,
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Logging,
    Model,
    Models,
    Rollout,
    Train,
)
from aligndistil.recipe.stage import Recipe, Stage
from aligndistil.recipe.yaml_positions import COMMAND_LINE, Node, dotted

STAGE_KEYS = ("objective", *SECTIONS)
TOP_KEYS = (*Header.model_fields, "extends", *STAGE_KEYS, "stages")
RESERVED = ("report",)
"""Folders of a run that are no stage's."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A stage on its way: what it wrote, that over the defaults, and what came of it."""

    own: Node
    merged: Node
    objective: Objective | None
    stage: Stage | None


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe. Raises UserError with one line for each problem, in file order."""
    path = Path(path)
    tree, text = read_recipe_tree(path)
    tree = apply_overrides(tree, overrides)
    problems: list[Problem] = []
    header = _header(tree, path, problems)
    defaults = _part(tree, STAGE_KEYS)
    own = _own_nodes(tree, defaults, problems)
    layered = {name: merge(defaults, node) for name, node in own.items()}
    drafts = {name: _draft(name, node, without_nulls(layered[name]), problems) for name, node in own.items()}
    if drafts and tree.child("stages") is not None:
        _check_defaults_are_used(defaults, drafts, problems)
        _check_overrides_reach_a_stage(defaults, layered, problems)
    order = _order(drafts, tree, problems)
    raise_all(problems)
    assert header is not None
    checked = {name: stage for name in order if (stage := drafts[name].stage) is not None}
    stages, report = with_revisions(checked, header.report, defaults)
    name = header.name or path.stem
    output_dir = Path(header.output_dir or f"runs/{name}")
    return Recipe(name, output_dir, stages, report, path, text, tree)


def _part(node: Node, keys: Sequence[str]) -> Node:
    return replace(node, value={key: child for key, child in (node.mapping or {}).items() if key in keys})


def _header(tree: Node, path: Path, problems: list[Problem]) -> Header | None:
    for key, child in (tree.mapping or {}).items():
        if key not in TOP_KEYS:
            problems.append(Problem(child.at, child.path, unknown_key(key, TOP_KEYS)))
    header = validated(Header, without_nulls(_part(tree, tuple(Header.model_fields))), problems)
    if header is not None and header.name is None and not re.match(r"^[A-Za-z0-9]", path.stem):
        problems.append(Problem(tree.at, ("name",), f"the file is called {path.name!r}; give the recipe a name"))
    return header


def _own_nodes(tree: Node, defaults: Node, problems: list[Problem]) -> dict[str, Node]:
    """What each stage wrote itself. A recipe without `stages` is one stage, named after its objective."""
    stages = tree.child("stages")
    if stages is None:
        name = tree.find(("objective", "name"))
        if tree.child("objective") is None:
            text = "a recipe needs `stages`, or one `objective` at the top; `aligndistil recipes ls` lists examples"
            problems.append(Problem(tree.at, (), text))
            return {}
        return {str(name.value) if name is not None else "objective": defaults}
    given = {name: node for name, node in (stages.mapping or {}).items() if node.value is not None}
    if not given:
        text = "must be a mapping from names to stages, with at least one that is not null"
        problems.append(Problem(stages.at, stages.path, text))
    return {name: node for name, node in given.items() if _is_stage(name, node, problems)}


def _is_stage(name: str, node: Node, problems: list[Problem]) -> bool:
    if name in RESERVED or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        text = "a stage's name is its folder's: letters, digits, `_` and `-`, starting with a letter, and not `report`"
        problems.append(Problem(node.at, node.path, text))
        return False
    if node.mapping is None:
        problems.append(Problem(node.value_at, node.path, "must be a mapping of sections"))
        return False
    for key, child in node.mapping.items():
        if key not in STAGE_KEYS:
            problems.append(Problem(child.at, child.path, unknown_key(key, STAGE_KEYS)))
    return True


def _draft(name: str, own: Node, merged: Node, problems: list[Problem]) -> _Draft:
    def section(key: str) -> Node:
        return merged.child(key) or Node({}, own.at, own.at, (*own.path, key))

    objective = _objective(section("objective"), problems)
    model = validated(Model, section("model"), problems)
    models = validated(Models, section("models"), problems)
    data = validated(Data, section("data"), problems)
    given = validated(Rollout, section("rollout"), problems)
    train = validated(Train, section("train"), problems)
    engine = validated(Engine, section("engine"), problems)
    evaluation = validated(Evaluation, section("evaluation"), problems)
    checkpoint = validated(Checkpoint, section("checkpoint"), problems)
    logging = validated(Logging, section("logging"), problems)
    own = without_nulls(own)
    roles, rollout = {}, given if merged.child("rollout") is not None else None
    if objective is not None and models is not None:
        check_code(models, merged, problems)
        roles = models_needed(objective, models, own, merged, problems)
    if objective is not None and given is not None:
        rollout = rollout_allowed(objective, rollout, own, merged, problems)
    if train is not None:
        check_batch(train, rollout, merged, problems)
    if objective is not None and train is not None:
        train = critic_allowed(objective, train, own, problems)
        check_preparation(objective, train, rollout, own, merged, problems)
        check_teacher_cache(objective, rollout, own, problems)
    if evaluation is not None and data is not None:
        check_evaluation(evaluation, data, merged, problems)
    if not (objective and model and data and train and engine and evaluation and checkpoint and logging):
        return _Draft(own, merged, objective, None)
    stage = Stage(
        name, objective, model, roles, data, rollout, train, engine, evaluation, checkpoint, logging, merged
    )  # fmt: skip
    return _Draft(own, merged, objective, stage)


def _objective(node: Node, problems: list[Problem]) -> Objective | None:
    known = registry()
    if node.mapping is None:
        text = f"must be a mapping, for example `objective: {{name: {next(iter(known))}}}`"
        problems.append(Problem(node.value_at, node.path, text))
        return None
    name = node.child("name")
    if name is None:
        text = f"is required; the objectives are {listed(known)}"
        problems.append(Problem(node.at, (*node.path, "name"), text))
        return None
    if name.value not in known:
        text = f"unknown objective `{name.plain()}`{guess_and_list(str(name.value), known, 'objectives')}"
        problems.append(Problem(name.value_at, name.path, text))
        return None
    return validated(known[name.value], node, problems)


def _check_defaults_are_used(defaults: Node, drafts: dict[str, _Draft], problems: list[Problem]) -> None:
    objectives = [draft.objective for draft in drafts.values() if draft.objective is not None]
    if len(objectives) < len(drafts):
        return
    defaults = without_nulls(defaults)
    needed = {role for objective in objectives for role in named_roles(objective)}
    models = defaults.child("models")
    for key, node in ((models.mapping if models else None) or {}).items():
        if key in Models.model_fields and key not in needed:
            problems.append(Problem(node.at, node.path, "no stage of this recipe reads this model; remove it"))
    if all(objective.on_policy is OnPolicy.NEVER for objective in objectives):
        _refuse(defaults.child("rollout"), "no stage of this recipe samples; remove this section", problems)
    elif all(objective.prepares is not Prepares.ROLLOUT for objective in objectives):
        for key in ("responses", "epochs"):
            text = "no stage of this recipe takes several optimizer steps on a rollout; remove it"
            _refuse(defaults.find(("rollout", key)), text, problems)
    if not any(Role.CRITIC in objective.needs for objective in objectives):
        rate = defaults.find(("train", "critic_learning_rate"))
        _refuse(rate, "no stage of this recipe trains a critic; remove it", problems)


def _refuse(node: Node | None, text: str, problems: list[Problem]) -> None:
    if node is not None:
        problems.append(Problem(node.at, node.path, text))


def _check_overrides_reach_a_stage(defaults: Node, layered: dict[str, Node], problems: list[Problem]) -> None:
    """A `--set` above the stages that every stage overrides would do nothing, silently."""
    reached = {node.at for stage in layered.values() for node in stage.walk()}
    for node in defaults.walk():
        if node.at.source == COMMAND_LINE and not isinstance(node.value, dict | list) and node.at not in reached:
            instead = f"{COMMAND_LINE} stages.{next(iter(layered))}.{dotted(node.path)}=..."
            text = f"has no effect, because every stage has its own; write `{instead}`"
            problems.append(Problem(node.at, node.path, text))


def _order(drafts: dict[str, _Draft], tree: Node, problems: list[Problem]) -> list[str]:
    references = {}
    for name, draft in drafts.items():
        used = set(named_roles(draft.objective)) if draft.objective else set(Models.model_fields)
        nodes = [node for node in references_of(draft.merged) if node.path[-2] == "model" or node.path[-1] in used]
        references[name] = nodes
    reported = [tree.find(("report", key)) for key in ("kl_to", "reward")]
    kept = [node for node in reported if node is not None and str(node.value).startswith(PREFIX)]
    for node in [*(node for nodes in references.values() for node in nodes), *kept]:
        if problem := unknown_stage(node, list(drafts)):
            problems.append(problem)
    check_kinds({name: d.objective for name, d in drafts.items() if d.objective}, {**references, "": kept}, problems)
    if problem := circle(references):
        problems.append(problem)
    return ordered(references)
