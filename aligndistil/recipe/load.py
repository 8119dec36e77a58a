"""From a file and its overrides to a checked recipe: what concerns the whole of it, and its stages together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from aligndistil.errors import guess_and_list, holds_secret
from aligndistil.objectives import registry, roles
from aligndistil.objectives.base import Need, OnPolicy, Prepares, Role
from aligndistil.recipe.layers import PATH_KEYS, apply_overrides, merge, read_recipe_tree, with_home, without_nulls
from aligndistil.recipe.problems import Problem, raise_all, unknown_key, validated
from aligndistil.recipe.revisions import with_revisions
from aligndistil.recipe.sections import Header
from aligndistil.recipe.stage import STAGE, STAGE_KEYS, Draft, Recipe, models_named_by, stage_class
from aligndistil.recipe.yaml_positions import COMMAND_LINE, Node, dotted

TOP_KEYS = (*Header.model_fields, "extends", *STAGE_KEYS, "stages")
LONGEST_NAME = 255
"""Bytes of a file's name."""
RESERVED = re.compile(r"report|initial|seed-\d+")
"""Names of a run folder's other folders, and of rows that are no stage's."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe. Raises UserError with one line for each problem, in file order."""
    path = Path(path)
    tree, text = read_recipe_tree(path)
    tree = with_home(apply_overrides(tree, overrides))
    problems = _unknown_keys(tree, TOP_KEYS) + _unsuitable_texts(tree)
    header = _header(tree, path, problems)
    defaults = _part(tree, STAGE_KEYS)
    own = _written_stages(tree, defaults, problems)
    layered = {name: merge(defaults, node) for name, node in own.items()}
    one_stage = stage_class()
    drafts, checked = {}, {}
    for name, node in own.items():
        drafts[name] = draft = Draft(name, without_nulls(node), _with_every_section(_complete(layered[name])))
        stage = validated(one_stage, draft.written, problems, draft)
        problems += draft.problems
        if stage is not None:
            checked[name] = stage
    if drafts and tree.child("stages") is not None:
        problems += _unused_defaults(without_nulls(defaults), drafts)
        problems += _overrides_without_effect(defaults, layered)
    problems += _rows_of_no_stage(tree, drafts)
    order = _check_references(tree, drafts, problems)
    raise_all(problems)
    assert header is not None
    stages, report = with_revisions({name: checked[name] for name in order}, header.report, defaults)
    name = header.name or path.stem
    return Recipe(name, Path(header.output_dir or f"runs/{name}"), stages, report, path, text, tree)


def _part(node: Node, keys: Sequence[str]) -> Node:
    return replace(node, value={key: child for key, child in (node.mapping or {}).items() if key in keys})


def _complete(stage: Node) -> Node:
    """A stage without nulls, except those that say something: an objective's field that means "none" by its null."""
    complete = without_nulls(stage)
    given = stage.child("objective")
    name = given.child("name") if given is not None and given.mapping else None
    cls = registry().get(str(name.value)) if name is not None else None
    if given is None or cls is None:
        return complete
    meant = {
        key: child
        for key, child in (given.mapping or {}).items()
        if child.value is None and key in cls.model_fields and _may_be_null(cls.model_fields[key])
    }
    sections = complete.mapping or {}
    objective = replace(given, value={**(sections["objective"].mapping or {}), **meant})
    return replace(complete, value={**sections, "objective": objective})


def _may_be_null(field: FieldInfo) -> bool:
    """Whether null is a value of the field, and not that which it has anyway."""
    return type(None) in get_args(field.annotation) and field.default is not None


def _with_every_section(stage: Node) -> Node:
    """The sections that were never written are empty, and placed where the stage is; no rollout is none."""
    empty = {key: Node({}, stage.at, stage.at, (*stage.path, key)) for key in STAGE_KEYS if key != "rollout"}
    return replace(stage, value=empty | (_part(stage, STAGE_KEYS).mapping or {}))


def _unknown_keys(node: Node, known: Sequence[str]) -> list[Problem]:
    items = (node.mapping or {}).items()
    return [Problem(child.at, child.path, unknown_key(key, known)) for key, child in items if key not in known]


def _unsuitable_texts(tree: Node) -> list[Problem]:
    """Passwords and tokens, which the run folder would keep, and paths that no file system can have."""
    problems, keys = [], {*PATH_KEYS, "output_dir", *roles()}
    for node in tree.walk():
        for text in node.mapping or (node.value,):
            if isinstance(text, str) and holds_secret(text):
                problems.append(
                    Problem(
                        node.value_at,
                        node.path,
                        "holds a password or a token, and recipes are copied into run folders and model cards; take it "
                        "out, and give it in the environment (such as HF_TOKEN) or in ~/.netrc",
                    )
                )
        is_path = isinstance(node.value, str) and node.path and node.path[-1] in keys and "\n" not in node.value
        if is_path and (longest := max(len(part.encode()) for part in node.value.split("/"))) > LONGEST_NAME:
            text = f"a name in this path has {longest} bytes, and files may have {LONGEST_NAME}; give a shorter one"
            if "{" not in node.value:  # a chat template may stand where its file's name does
                problems.append(Problem(node.value_at, node.path, text))
    return problems


def _header(tree: Node, path: Path, problems: list[Problem]) -> Header | None:
    header = validated(Header, without_nulls(_part(tree, tuple(Header.model_fields))), problems)
    if header is not None and header.name is None and not re.match(r"^[A-Za-z0-9]", path.stem):
        problems.append(Problem(tree.at, ("name",), f"the file is called {path.name!r}; give the recipe a name"))
    return header


def _written_stages(tree: Node, defaults: Node, problems: list[Problem]) -> dict[str, Node]:
    """What each stage wrote itself. A recipe without `stages` is one stage, named after its objective."""
    stages = tree.child("stages")
    if stages is None:
        objective = tree.find(("objective", "name"))
        if tree.child("objective") is None:
            text = "a recipe needs `stages`, or one `objective` at the top; `aligndistil recipes ls` lists examples"
            problems.append(Problem(tree.at, (), text))
            return {}
        return {str(objective.value) if objective is not None else "objective": defaults}
    given = {name: node for name, node in (stages.mapping or {}).items() if node.value is not None}
    if not given:
        text = "must be a mapping from names to stages, with at least one that is not null"
        problems.append(Problem(stages.at, stages.path, text))
    found = {}
    for name, node in given.items():
        if RESERVED.fullmatch(name) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{,199}", name):
            rule = "letters, digits, `_` and `-`, starting with a letter, and not `report`, `initial` or `seed-0`"
            rule += ", at most 200 characters"
            problems.append(Problem(node.at, node.path, f"a stage's name is its folder's: {rule}"))
        elif node.mapping is None:
            problems.append(Problem(node.value_at, node.path, "must be a mapping of sections"))
        else:
            problems += _unknown_keys(node, STAGE_KEYS)
            found[name] = node
    return found


def _unused_defaults(defaults: Node, drafts: Mapping[str, Draft]) -> list[Problem]:
    """What stands above `stages` and is of no use to any of them."""
    objectives = [draft.objective for draft in drafts.values() if draft.objective is not None]
    if len(objectives) < len(drafts):
        return []
    unused: list[tuple[Node | None, str]] = []
    named = {role for objective in objectives for role in models_named_by(objective)}
    models = defaults.child("models")
    for role, node in ((models.mapping if models else None) or {}).items():
        if role in roles() and role not in named:
            unused.append((node, "no stage of this recipe reads this model; remove it"))
    if all(objective.on_policy is OnPolicy.NEVER for objective in objectives):
        unused.append((defaults.child("rollout"), "no stage of this recipe samples; remove this section"))
    elif all(objective.prepares is not Prepares.ROLLOUT for objective in objectives):
        text = "no stage of this recipe takes several optimizer steps on a rollout; remove it"
        unused += [(defaults.find(("rollout", key)), text) for key in ("responses", "epochs")]
    if not any(Role.CRITIC in objective.needs for objective in objectives):
        rate = defaults.find(("train", "critic_learning_rate"))
        unused.append((rate, "no stage of this recipe trains a critic; remove it"))
    return [Problem(node.at, node.path, text) for node, text in unused if node is not None]


def _rows_of_no_stage(tree: Node, drafts: Mapping[str, Draft]) -> list[Problem]:
    """What `report.rows` names and no stage is called; an inherited stage that is left out is none of them."""
    stages, rows = tree.child("stages"), tree.find(("report", "rows"))
    known = {**drafts, **((stages.mapping if stages is not None else None) or {})}
    return [
        Problem(node.at, node.path, f"no stage has this name{guess_and_list(name, drafts, 'stages')}")
        for name, node in ((rows.mapping if rows is not None else None) or {}).items()
        if drafts and name not in known
    ]


def _overrides_without_effect(defaults: Node, layered: Mapping[str, Node]) -> list[Problem]:
    """A `--set` above the stages that every stage overrides would do nothing, silently."""
    reached = {node.at for stage in layered.values() for node in stage.walk()}
    problems = []
    for node in defaults.walk():
        if node.at.source == COMMAND_LINE and not isinstance(node.value, dict | list) and node.at not in reached:
            instead = f"{COMMAND_LINE} stages.{next(iter(layered))}.{dotted(node.path)}=..."
            text = f"has no effect, because every stage has its own; write `{instead}`"
            problems.append(Problem(node.at, node.path, text))
    return problems


def _check_references(tree: Node, drafts: Mapping[str, Draft], problems: list[Problem]) -> list[str]:
    """Stage names, each after those whose models it uses, and in file order where that leaves a choice.

    A reference `stage:NAME` must name a stage, of the kind that is needed, and none that waits for this one: stages of
    such a circle, and those that wait for them, are left out.
    """
    references: dict[str, list[Node]] = {}
    reads: list[tuple[Node, Need]] = []
    for name, draft in drafts.items():
        # A value head may start from any model; so may, for all we know, a role of an objective we do not know.
        needs: Mapping[str, Need] = dict.fromkeys(roles(), Need.VALUE)
        if draft.objective is not None:
            needs = {role: draft.objective.needs[role] for role in models_named_by(draft.objective)}
        path, models = draft.written.find(("model", "path")), draft.written.child("models")
        given = [] if path is None else [(path, Need.LOGP)]
        written = (models.mapping if models is not None else None) or {}
        given += [(node, needs[role]) for role, node in written.items() if role in needs]
        given = [(node, need) for node, need in given if str(node.value).startswith(STAGE)]
        references[name] = [node for node, _ in given]
        reads += given
    for key, need in (("kl_to", Need.LOGP), ("against", Need.LOGP), ("reward", Need.SCORE), ("judge", Need.SCORE)):
        node = tree.find(("report", key))
        if node is not None and str(node.value).startswith(STAGE):
            reads.append((node, need))
    for node, need in reads:
        name = _stage_named(node)
        source = drafts[name].objective if name in drafts else None
        if name not in drafts:
            text = f"no stage is named `{name}`{guess_and_list(name, drafts, 'stages')}"
        elif source is None or need is Need.VALUE or need.is_scalar == source.is_scalar:
            continue
        elif need.is_scalar:
            text = f"`{source.name}` trains a language model, which has no scalar head; name a stage that trains one"
        else:
            text = f"`{source.name}` trains a scalar head, not a language model; name a stage that trains one"
        problems.append(Problem(node.value_at, node.path, text))
    return _in_order(references, problems)


def _in_order(references: Mapping[str, Sequence[Node]], problems: list[Problem]) -> list[str]:
    waiting = dict(references)

    def unmet(name: str) -> list[Node]:
        return [node for node in waiting[name] if _stage_named(node) in waiting]

    order: list[str] = []
    while ready := next((name for name in waiting if not unmet(name)), None):
        order.append(ready)
        del waiting[ready]
    if waiting:
        seen: list[str] = []
        name = next(iter(waiting))
        while name not in seen:
            seen.append(name)
            name = _stage_named(unmet(name)[0])
        circle = " -> ".join([*seen[seen.index(name) :], name])
        first = unmet(name)[0]
        text = f"the stages wait for each other in a circle: {circle}"
        problems.append(Problem(first.value_at, first.path, text))
    return order


def _stage_named(reference: Node) -> str:
    return str(reference.value).removeprefix(STAGE)
