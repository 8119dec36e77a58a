"""Objectives as a stranger writes them: three files outside the package, each found, checked, planned and trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

HERE = Path(__file__).parent
OBJECTIVES = {"orpo": "ORPO", "jsd": "JSD", "grpo": "GRPO"}
REWARD = "def length(*, responses, **other):\n    return [float(len(response)) for response in responses]\n"
RECIPE: dict[str, Any] = {
    "model": {"path": "builtin:tiny"},
    "data": {
        "train": {"path": "builtin:reviews", "split": "train", "limit": 16},
        "eval": {"path": "builtin:reviews", "split": "test", "limit": 4},
        "max_response_length": 32,
    },
    "train": {"learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 2, "max_steps": 3},
    "engine": {"zero_stage": 0},
    "report": {"samples": 2},
}
OWN: dict[str, dict[str, Any]] = {
    "orpo": {},
    "jsd": {"models": {"expert": "builtin:tiny"}, "rollout": {"max_new_tokens": 16}},
    "grpo": {
        "models": {"reward": "python:rewards:length"},
        "rollout": {"max_new_tokens": 16, "samples_per_prompt": 4, "responses": 16, "epochs": 2},
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install` of a package with the three objectives leaves it, with a recipe for each."""
    folder = tmp_path_factory.mktemp("site")
    for name, own in OWN.items():
        (folder / f"stranger_{name}.py").write_text((HERE / f"{name}.py").read_text())
        recipe = {**RECIPE, **own, "name": name, "objective": {"name": name}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "rewards.py").write_text(REWARD)
    info = folder / "stranger-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.1\n")
    points = [f"{name} = stranger_{name}:{cls}" for name, cls in OBJECTIVES.items()]
    (info / "entry_points.txt").write_text("\n".join(["[aligndistil.objectives]", *points]))
    return folder


def run(site: Path, *arguments: str, code: int = 0) -> str:
    """`aligndistil ARGUMENTS` there; what it said."""
    root = HERE.parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "aligndistil", *arguments],
        cwd=site, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines_of(site: Path, name: str) -> list[dict[str, Any]]:
    text = (site / "runs" / name / name / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stranger_s_objective_is_one_file_of_sixty_lines(name: str) -> None:
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 60


def test_they_are_listed_with_their_fields_and_their_role_is_accepted(site: Path) -> None:
    listed = {one["name"]: one for one in json.loads(run(site, "objectives", "--json"))}
    assert set(OBJECTIVES) <= set(listed)
    assert listed["jsd"]["models"] == {"policy": "distribution", "expert": "distribution"}
    said = run(site, "validate", "jsd.yaml", "--set", "models.teacher=builtin:tiny", code=2)
    assert "models.teacher: `jsd` does not read this model (it reads `expert`); remove the line" in said


@pytest.mark.parametrize(("name", "metric"), [("orpo", "odds/log_ratio"), ("jsd", "jsd/sequence")])
def test_orpo_and_jsd_are_checked_and_train(site: Path, name: str, metric: str) -> None:
    assert name in run(site, "validate", f"{name}.yaml")
    said = run(site, "train", f"{name}.yaml")
    assert f"{name}/final" in said
    lines = lines_of(site, name)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(metric in line for line in lines)
    if name == "jsd":  # the policy begins as the expert
        assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_grpo_trains_with_groups_of_four_at_micro_batch_two(site: Path) -> None:
    run(site, "train", "grpo.yaml", "--allow-code")
    lines = lines_of(site, "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Advantages of a group sum to 0, and at the first step the ratio is 1: minus their mean is the loss.
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-3)
    assert lines[0]["grad_norm"] > 0
    assert lines[0]["objective/scores"] > 0


def test_how_a_group_is_cut_into_micro_batches_changes_nothing(site: Path) -> None:
    for micro in (1, 4, 8):
        settings = [f"train.micro_batch_size={micro}", "train.max_steps=2", f"output_dir=runs/micro-{micro}"]
        run(site, "train", "grpo.yaml", "--allow-code", *(part for one in settings for part in ("--set", one)))
    first, *others = [
        [json.loads(line) for line in (site / f"runs/micro-{micro}/grpo/metrics.jsonl").read_text().splitlines()]
        for micro in (1, 4, 8)
    ]
    for other in others:
        for one, two in zip(first, other, strict=True):
            if one["split"] == "train":
                assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
                assert two.get("objective/scores") == one.get("objective/scores")  # on the first step of a rollout


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("rollout.samples_per_prompt=1", "compares the samples of one prompt with each other"),
        ("rollout.samples_per_prompt=3", "train.batch_size: 8 is not a multiple of rollout.samples_per_prompt, 3"),
    ],
)
def test_a_group_that_cannot_work_is_refused_with_one_sentence(site: Path, setting: str, sentence: str) -> None:
    said = run(site, "validate", "grpo.yaml", "--set", setting, code=2)
    assert sentence in said
    assert said.count("error:") == 1


def test_a_group_may_not_be_shared_by_processes(site: Path) -> None:
    said = run(site, "validate", "grpo.yaml", "--processes", "4", code=2)
    assert "samples_per_prompt" in said
    assert said.count("error:") == 1


def test_group_advantages_by_hand() -> None:
    import sys as system

    system.path.insert(0, str(HERE))
    try:
        from grpo import group_advantages
    finally:
        system.path.remove(str(HERE))
    # 1 and 3: mean 2, deviation 1; 5, 5: no deviation; rows of a group need not stand together.
    found = group_advantages(torch.tensor([1.0, 5.0, 3.0, 5.0]), torch.tensor([7, 2, 7, 2]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0]), rtol=1e-3, atol=1e-3)
