"""Objectives as a stranger writes them: three files outside the package, each found, checked, planned and trained."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aligndistil import cli
from aligndistil.objectives import registry

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


@pytest.fixture
def aligndistil(
    site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """`aligndistil ARGUMENTS` there, in this process: ends with `code`; what it said."""
    monkeypatch.chdir(site)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    registry.cache_clear()

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["aligndistil", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = "".join(capfd.readouterr())
        assert (ended.value.code or 0) == code, said
        return said

    yield call
    monkeypatch.undo()
    registry.cache_clear()


def run(site: Path, *arguments: str, code: int = 0) -> str:
    """The same in a process of its own, as a stranger runs it."""
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


def test_they_are_found_and_listed(site: Path) -> None:
    listed = {one["name"]: one for one in json.loads(run(site, "objectives", "--json"))}
    assert set(OBJECTIVES) <= set(listed)
    assert listed["jsd"]["models"] == {"policy": "distribution", "expert": "distribution"}


def test_a_role_of_its_own_is_accepted_and_one_it_does_not_read_refused(aligndistil: Callable[..., str]) -> None:
    assert "against expert builtin:tiny" in aligndistil("validate", "jsd.yaml")
    said = aligndistil("validate", "jsd.yaml", "--set", "models.teacher=builtin:tiny", code=2)
    assert "models.teacher: `jsd` does not read this model (it reads `expert`); remove the line" in said


@pytest.mark.parametrize(("name", "metric"), [("orpo", "odds/log_ratio"), ("jsd", "jsd/sequence")])
def test_orpo_and_jsd_are_checked_and_train(
    aligndistil: Callable[..., str], site: Path, name: str, metric: str
) -> None:
    assert name in aligndistil("validate", f"{name}.yaml")
    said = aligndistil("train", f"{name}.yaml")
    assert f"{name}/final" in said
    lines = lines_of(site, name)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(metric in line for line in lines)
    if name == "jsd":  # the policy begins as the expert
        assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_grpo_trains_with_groups_of_four_at_micro_batch_two(aligndistil: Callable[..., str], site: Path) -> None:
    aligndistil("train", "grpo.yaml", "--allow-code")
    lines = lines_of(site, "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Advantages of a group sum to 0, and at the first step the ratio is 1: minus their mean is the loss.
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-3)
    assert lines[0]["grad_norm"] > 0
    assert lines[0]["objective/scores"] > 0


def test_how_a_group_is_cut_into_micro_batches_changes_nothing(aligndistil: Callable[..., str], site: Path) -> None:
    for micro in (1, 4, 8):
        settings = [f"train.micro_batch_size={micro}", "train.max_steps=2", f"output_dir=runs/micro-{micro}"]
        aligndistil("train", "grpo.yaml", "--allow-code", *(part for one in settings for part in ("--set", one)))
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
def test_a_group_that_cannot_work_is_refused_with_one_sentence(
    aligndistil: Callable[..., str], setting: str, sentence: str
) -> None:
    said = aligndistil("validate", "grpo.yaml", "--set", setting, code=2)
    assert sentence in said
    assert said.count("error:") == 1


def test_a_group_may_not_be_shared_by_processes(aligndistil: Callable[..., str]) -> None:
    said = aligndistil("validate", "grpo.yaml", "--processes", "4", code=2)
    assert "samples_per_prompt" in said
    assert said.count("error:") == 1


def test_group_advantages_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    group_advantages = importlib.import_module("grpo").group_advantages
    # 1 and 3: mean 2, deviation 1; 5, 5: no deviation; rows of a group need not stand together.
    found = group_advantages(torch.tensor([1.0, 5.0, 3.0, 5.0]), torch.tensor([7, 2, 7, 2]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0]), rtol=1e-3, atol=1e-3)
