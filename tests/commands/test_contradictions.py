"""Recipes that contradict themselves: one sentence each, from `validate`, `--dry-run` and `train` alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands.contradictions import contradictions
from aligndistil.commands.data_checks import read_stages
from aligndistil.commands.recipes import shipped_recipes
from aligndistil.errors import ServiceError
from aligndistil.recipe import load_recipe
from support.models import CHAT
from support.recipes import merged

DPO: dict[str, Any] = {"objective": {"name": "dpo", "beta": 0.1}, "models": {"reference": "M"}}
REVERSE = merged(DPO, {"data": {"reverse_preferences": True}})
TEACHERS = {"teacher": "stage:dpo", "reverse_teacher": "stage:reverse"}
POLICY: dict[str, Any] = {
    "objective": {"name": "aligndistil"},
    "models": TEACHERS,
    "rollout": {"max_new_tokens": 4},
    "train": {"micro_batch_size": 2},
}
STAGES = {"dpo": DPO, "reverse": REVERSE, "policy": POLICY}
OTHER_CHAT = CHAT.replace("<bot>", "<bot> <bot>")


def stages(**changes: Any) -> dict[str, Any]:
    """The three stages with changes to some: of `None`, without it."""
    return {name: merged(STAGES.get(name, {}), changes.get(name, {})) for name in {**STAGES, **changes}}


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # stages, and what each sentence says
    "nothing": (stages(), []),
    "beta0": (
        stages(policy={"objective": {"beta0": 0.3}}),
        [
            "stages.policy.objective.beta0: 0.3 is not the beta that stage dpo, its teacher, is trained with, 0.1",
            "beta0: 0.3 is not the beta that stage reverse, its reverse teacher, is trained with, 0.1",
        ],
    ),
    "beta of one teacher": (
        stages(reverse={"objective": {"beta": 0.2}}),
        ["objective.beta0: 0.1 is not the beta that stage reverse, its reverse teacher, is trained with, 0.2"],
    ),
    "beta0 of another method": (
        stages(policy={"objective": {"name": "bandit", "beta0": 0.3}, "rollout": {"samples_per_prompt": 1}}),
        ["beta0: 0.3 is not", "beta0: 0.3 is not"],
    ),
    "both betas": (
        stages(
            dpo={"objective": {"beta": 0.3}},
            reverse={"objective": {"beta": 0.3}},
            policy={"objective": {"beta0": 0.3}},
        ),
        [],
    ),
    "one stage as both teachers": (
        stages(policy={"models": {"reverse_teacher": "stage:dpo"}}),
        ["models.reverse_teacher: stage:dpo is the teacher too", "stage dpo learns preferences as they are"],
    ),
    "one folder as both teachers": (
        stages(policy={"models": {"teacher": "M", "reverse_teacher": "M"}}),
        ["models.reverse_teacher: M is the teacher too"],
    ),
    "the teacher as its reference": (
        {
            "dpo": DPO,
            "policy": merged(
                {**POLICY, "models": {}, "model": {"path": "stage:dpo"}},
                {"objective": {"reward": "vanilla"}, "models": {"teacher": "stage:dpo", "reference": "stage:dpo"}},
            ),
        },
        ["models.reference: stage:dpo is the teacher too"],
    ),
    "a reverse teacher of preferences as they are": (
        stages(reverse={"data": {"reverse_preferences": False}}),
        ["models.reverse_teacher: stage reverse learns preferences as they are"],
    ),
    "a teacher of reversed preferences": (
        stages(dpo={"data": {"reverse_preferences": True}}),
        ["models.teacher: stage dpo learns reversed preferences"],
    ),
    "a start from reversed preferences": (
        stages(policy={"model": {"path": "stage:reverse"}}),
        ["stages.policy.model.path: stage reverse learns reversed preferences"],
    ),
    "a teacher without a reference": (
        {**STAGES, "dpo": {"objective": {"name": "simpo"}}},
        ["models.teacher: stage dpo trains `simpo`, whose reward is not the log-ratio"],
    ),
    "a teacher that learnt no preferences": (
        {**STAGES, "dpo": {"objective": {"name": "sft"}}},
        ["models.teacher: stage dpo trains `sft`, whose reward is not the log-ratio"],
    ),
    "another start than the reference": (
        stages(dpo={"models": {"reference": "N"}}),
        [
            "stages.dpo.models.reference: the policy starts from M and is compared with N",
            "the teachers have different references (dpo N and reverse M)",
        ],
    ),
    "another template": (
        stages(dpo={"model": {"chat_template": OTHER_CHAT}}, reverse={"model": {"chat_template": OTHER_CHAT}}),
        [
            "the chat template of M is another than the policy's",
            "the chat template of M is another than the policy's",
            "models.teacher: the chat template of stage:dpo is another than the policy's",
            "models.reverse_teacher: the chat template of stage:reverse is another than the policy's",
        ],
    ),
    "a rate": ({"dpo": merged(DPO, {"train": {"learning_rate": 300.0}})}, ["train.learning_rate: 300 moves every"]),
    "a high rate that trains": ({"dpo": merged(DPO, {"train": {"learning_rate": 0.01}})}, []),
    "a long warm-up": ({"dpo": merged(DPO, {"train": {"warmup_ratio": 1.0}})}, ["1 of the training is warm-up"]),
    "a floor without a fall": (
        {"dpo": merged(DPO, {"train": {"lr_scheduler": "constant", "min_lr_ratio": 0.1}})},
        ["train.min_lr_ratio: a constant learning rate has no floor"],
    ),
    "beyond the end": (
        {
            "dpo": merged(
                DPO, {"checkpoint": {"every": 100}, "data": {"eval": {"path": "D"}}, "evaluation": {"every": 3}}
            )
        },
        ["evaluation.every: the stage has 2 steps, so that 3 never comes", "checkpoint.every: the stage has 2 steps"],
    ),
    "at the end": ({"dpo": merged(DPO, {"checkpoint": {"every": 2}})}, []),
}


@pytest.fixture
def recipe(
    recipe_file: Callable[..., Path], model_folder: Callable[..., str], pairs_file: Callable[..., str]
) -> Callable[[dict[str, Any]], Path]:
    """Writes a recipe of stages with models M and N and data D."""
    named = {"M": model_folder(seed=0), "N": model_folder(seed=1), "D": pairs_file(8)}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    def write(of: dict[str, Any]) -> Path:
        shared = {"model": {"path": "M"}, "data": {"train": {"path": "D"}}, "engine": {"zero_stage": 0}}
        train = {"batch_size": 4, "learning_rate": 1e-4}
        return recipe_file(filled({**shared, "train": train, "stages": of}))

    return write


@pytest.mark.parametrize("case", CASES)
def test_what_contradicts_itself_is_said(
    case: str, recipe: Callable[..., Path], model_folder: Callable[..., str]
) -> None:
    of, expected = CASES[case]
    loaded = load_recipe(recipe(of))
    said = [
        line.replace(model_folder(seed=0), "M").replace(model_folder(seed=1), "N")
        for line in contradictions(loaded, read_stages(loaded, list(loaded.stages)))
    ]
    for line, part in zip(said, expected, strict=True):
        assert part in line
        assert "toy.yaml:" in line


@pytest.mark.parametrize("command", ["validate", "dry run", "train"])
def test_all_commands_say_it_and_go_on(
    command: str, recipe: Callable[..., Path], command_line: Callable[..., tuple[int, str, str]]
) -> None:
    path = recipe({"dpo": merged(DPO, {"train": {"learning_rate": 300.0, "max_steps": 1}})})
    arguments = {"validate": ["validate", path], "dry run": ["train", path, "--dry-run"], "train": ["train", path]}
    code, out, err = command_line(*arguments[command])
    assert out.count("dpo.train.learning_rate: 300 moves every weight") == 1
    assert code == 0, err


def test_the_shipped_recipes_contradict_nothing() -> None:
    for name, path in shipped_recipes().items():
        loaded = load_recipe(path)
        assert contradictions(loaded, dict.fromkeys(loaded.stages, ServiceError("not read"))) == [], name
