"""A run that was stopped or killed, at whatever moment, ends as one that was not: weights, metrics and samples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.engine.checkpoint import checkpoints
from aligndistil.engine.processes import Processes
from aligndistil.errors import EXIT_SIGTERM, Interrupted, UserError
from aligndistil.files import is_partial
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import Done, StageFolder
from aligndistil.training import StageTraining
from support.loop import Stop
from support.recipes import actor_critic, off_policy, on_policy, unpaired
from support.run_folders import differences, left_behind, lines

ModelFolder = Callable[..., str]
ADAPTERS: dict[str, Any] = {"model": {"gradient_checkpointing": True, "lora": {"r": 4, "dropout": 0.2}}}


@pytest.fixture
def content_of(model_folder: ModelFolder, pairs_file: Callable[..., str]) -> Callable[[str], dict[str, Any]]:
    """A recipe of one stage by its kind: "on-policy", or a kind and its ZeRO stage such as "zero 2"."""

    def content(kind: str) -> dict[str, Any]:
        model, data = model_folder(seed=0), pairs_file(10)
        if kind == "on-policy":
            return on_policy(model, model_folder(seed=1), model_folder(seed=2), data)
        engine = {"zero_stage": int(kind[-1])}
        if kind.startswith("actor-critic"):
            reward, critic = (model_folder(seed=seed, scalar=True) for seed in (3, 4))
            return actor_critic(model, reward, critic, data, engine=engine)
        if kind.startswith("unpaired"):
            return unpaired(model, data, engine=engine)
        if kind.startswith("adapters"):
            return off_policy(model, data, engine=engine, **ADAPTERS)
        return off_policy(model, data, engine=engine)

    return content


@pytest.fixture
def run(recipe_file: Callable[..., Path], processes: Processes, tmp_path: Path) -> Callable[..., Any]:
    """What a run in the folder `name` leaves behind; None when it was stopped after that many steps."""

    def run(content: dict[str, Any], name: str, stop_after: int | None = None) -> dict[str, Any] | None:
        (stage,) = load_recipe(recipe_file(content)).stages.values()
        folder = StageFolder(tmp_path / name)
        steps = iter(range(1, 10**9))
        # The loop asks once a step.
        stop: Any = Stop(lambda: next(steps) == stop_after)
        try:
            outcome = StageTraining(stage, folder, lambda model: model, processes).run(stop)
        except Interrupted:
            return None
        figures = {"step": outcome.steps, "seconds": outcome.seconds, "metrics": outcome.metrics}
        folder.write_done(Done(fingerprint="", weights="", resolved={}, **figures))
        return left_behind(folder.path)

    return run


@pytest.mark.parametrize("kind", ["zero 0", "zero 2", "zero 3", "on-policy", "unpaired 0", "adapters 2", "adapters 3"])
@pytest.mark.parametrize("stop_after", [5])
def test_five_steps_and_five_more_are_ten(
    kind: str,
    stop_after: int,
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    content = content_of(kind)
    straight = run(content, "straight")
    assert run(content, "twice", stop_after) is None
    assert checkpoints(tmp_path / "twice")[-1].name == "checkpoint-5"
    again = run(content, "twice")
    assert list(differences(straight, again)) == []
    assert [line["step"] for line in straight["lines"] if line["split"] == "train"] == [3, 6, 9, 10]
    assert [line["step"] for line in straight["lines"] if line["split"] == "eval"] == [0, 4, 8, 10]
    assert straight["lines"][-1]["step"] == 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["zero 0", "zero 2", "zero 3", "on-policy"])
def test_on_a_gpu_five_steps_and_five_more_are_ten(
    kind: str, dtype: str, content_of: Callable[[str], dict[str, Any]], run: Callable[..., Any]
) -> None:
    content = content_of(kind)
    content["model"]["dtype"] = dtype
    straight = run(content, "straight")
    assert run(content, "twice", 5) is None
    assert list(differences(straight, run(content, "twice"))) == []


@pytest.mark.parametrize("zero", [0, 2])
def test_a_stop_inside_a_round_waits_for_its_end_and_both_models_go_on_from_there(
    zero: int,
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    content = content_of(f"actor-critic {zero}")
    straight = run(content, "straight")
    assert run(content, "twice", stop_after=3) is None
    assert [path.name for path in checkpoints(tmp_path / "twice")] == ["checkpoint-4"]
    again = run(content, "twice")
    assert list(differences(straight, again)) == []
    training = [line for line in straight["lines"] if line["split"] == "train"]
    assert [line["step"] for line in training] == [3, 6, 9, 10]
    coefficients = [line["objective/kl_coef"] for line in training if "objective/kl_coef" in line]
    assert len(coefficients) == 3  # of the rounds that start at 0, 4 and 8
    assert len(set(coefficients)) == 3


def test_a_stop_in_the_last_step_and_a_lost_export_lose_nothing(
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Killed after the checkpoint of the last step, before the model was written: nothing is left to train."""
    content = content_of("zero 0")
    straight = run(content, "one", stop_after=10)
    (tmp_path / "one" / "final").rename(tmp_path / "lost")
    again = run(content, "one")
    assert list(differences(straight, again)) == []


def test_a_run_killed_before_its_first_checkpoint_starts_over_with_one_line_a_step(
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The evaluation of step 0 was already written, and so was half a line."""
    content = content_of("zero 0")
    straight = run(content, "straight")
    killed = tmp_path / "killed"
    killed.mkdir()
    whole = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text(whole[0] + whole[1][:20])
    again = run(content, "killed")
    assert list(differences(straight, again)) == []


def test_more_checkpoints_than_are_kept_are_removed(
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    content = content_of("zero 0")
    content["checkpoint"] = {"every": 3, "keep": 2}
    run(content, "one")
    assert [path.name for path in checkpoints(tmp_path / "one")] == ["checkpoint-6", "checkpoint-9"]


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    elif how == "truncated":
        path.write_bytes(content[:-20])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize("name", ["*model_states.pt", "*optim_states.pt", "random-0.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str,
    how: str,
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = content_of("zero 2")
    straight = run(content, "straight")
    assert run(content, "twice", stop_after=9) is None
    before, newest = checkpoints(tmp_path / "twice")
    (file,) = newest.rglob(name)
    damaged(file, how)
    if name != "checkpoint.json" or how != "gone":  # without its record, it was never finished
        with caplog.at_level("WARNING"):
            again = run(content, "twice")
        assert f"{newest} is not used: {file.relative_to(newest)} is not as it was written" in caplog.text
    else:
        again = run(content, "twice")
    assert list(differences(straight, again)) == []
    assert before.name == "checkpoint-8"


def test_a_run_whose_checkpoints_are_all_damaged_starts_over(
    content_of: Callable[[str], dict[str, Any]], run: Callable[..., Any], tmp_path: Path
) -> None:
    content = content_of("zero 0")
    straight = run(content, "straight")
    assert run(content, "twice", stop_after=6) is None
    for checkpoint in checkpoints(tmp_path / "twice"):
        damaged(checkpoint / "random-0.pt", "flipped")
    assert list(differences(straight, run(content, "twice"))) == []


@pytest.mark.parametrize("how", ["another stage's", "another name"])
def test_a_checkpoint_that_is_another_stage_s_or_has_another_name_is_not_continued(
    how: str,
    content_of: Callable[[str], dict[str, Any]],
    run: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = content_of("zero 0")
    straight = run(content, "straight")
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "started.json").write_text(f'{{"fingerprint": "{name}"}}')
    assert run(content, "mine", stop_after=5) is None
    newest = checkpoints(tmp_path / "mine")[-1]
    if how == "another name":
        newest.rename(newest.with_name("checkpoint-9"))
    else:
        seeded = {**content, "train": {**content["train"], "seed": 7}}
        assert run(seeded, "other", stop_after=7) is None
        shutil.copytree(checkpoints(tmp_path / "other")[-1], tmp_path / "mine" / "checkpoint-8")
    with caplog.at_level("WARNING"):
        again = run(content, "mine")
    assert "is not used: it is another stage's" in caplog.text
    assert list(differences(straight, again)) == []


class Planted:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["*model_states.pt", "*optim_states.pt", "random-0.pt"])
def test_a_checkpoint_runs_no_code_even_if_its_record_fits(
    name: str, content_of: Callable[[str], dict[str, Any]], run: Callable[..., Any], tmp_path: Path
) -> None:
    content = content_of("zero 2")
    assert run(content, "twice", stop_after=5) is None
    newest = checkpoints(tmp_path / "twice")[-1]
    (file,) = newest.rglob(name)
    states = torch.load(file, weights_only=False)
    torch.save({**states, "planted": Planted(tmp_path / "it ran")}, file)
    record = json.loads((newest / "checkpoint.json").read_text())
    del record["sha256"]
    record["files"][file.relative_to(newest).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (newest / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"(?s)holds more than tensors and numbers.*mkdir"):
        run(content, "twice")
    assert not (tmp_path / "it ran").exists()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.002)


def test_sigterm_saves_a_checkpoint_and_ends_with_143(
    runs: Any, recipe_file: Callable[..., Path], content_of: Callable[[str], dict[str, Any]]
) -> None:
    content = content_of("on-policy") | {"checkpoint": {"every": "never"}, "logging": {"every": 1}}
    recipe = recipe_file(content)
    stage = recipe.parent / "runs" / "toy" / "aligndistil"
    process = runs.start(recipe)
    log = stage / "metrics.jsonl"
    until(lambda: log.is_file() and len(log.read_text().splitlines()) > 3)
    os.kill(process, signal.SIGTERM)
    assert runs.wait() == EXIT_SIGTERM
    assert "a checkpoint is saved, run the same command to go on" in recipe.with_suffix(".log").read_text()
    (saved,) = checkpoints(stage)
    assert not (stage / "final").exists()
    assert lines(stage)[-1]["step"] == int(saved.name.rpartition("-")[2])
    runs.start(recipe)
    assert runs.wait() == 0
    assert [line["step"] for line in lines(stage) if line["split"] == "train"] == list(range(1, 11))


def killed_until_finished(runs: Any, recipe: Path, log: Path, kills: int, longest: float) -> int:
    """The number of times it was really killed."""
    killed = 0
    for attempt in range(kills):
        process = runs.start(recipe)
        if attempt == 0:  # a busy machine times the runs badly, and at least one kill must find a run that trains
            until(lambda: log.is_file() and len(log.read_text().splitlines()) > 1)
        else:
            # Where in the run it is killed is left to chance on purpose; what must come out is not.
            time.sleep(random.uniform(0.05, longest))
        with contextlib.suppress(ProcessLookupError):  # it had finished
            os.kill(process, signal.SIGKILL)
        killed += runs.wait() == -signal.SIGKILL
    runs.start(recipe)
    assert runs.wait() == 0, recipe.with_suffix(".log").read_text()[-3000:]
    return killed


def survives_kills(
    runs: Any, recipe_file: Callable[..., Path], content: dict[str, Any], stages: list[str], kills: int
) -> None:
    straight, killed = recipe_file({**content, "name": "straight"}, "straight.yaml"), recipe_file(content)
    began = time.monotonic()
    runs.start(straight)
    assert runs.wait() == 0, straight.with_suffix(".log").read_text()[-3000:]
    log = killed.parent / "runs" / "toy" / stages[0] / "metrics.jsonl"
    times = killed_until_finished(runs, killed, log, kills, time.monotonic() - began)
    assert times >= 1
    for stage in stages:
        folders = [recipe.parent / "runs" / name / stage for recipe, name in ((straight, "straight"), (killed, "toy"))]
        one, other = map(left_behind, folders)
        assert list(differences(one, other)) == [], f"{stage} after {times} kills"
        assert not list(filter(is_partial, folders[1].iterdir()))


@pytest.mark.parametrize("kind", ["on-policy", "actor-critic 0"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    kind: str,
    runs: Any,
    recipe_file: Callable[..., Path],
    content_of: Callable[[str], dict[str, Any]],
) -> None:
    content = content_of(kind)
    survives_kills(runs, recipe_file, content, [content["objective"]["name"]], kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero 0", "zero 2", "zero 3", "on-policy", "actor-critic 2", "unpaired 3"])
def test_a_run_killed_many_times_ends_with_the_same_bits(
    kind: str,
    runs: Any,
    recipe_file: Callable[..., Path],
    content_of: Callable[[str], dict[str, Any]],
) -> None:
    content = content_of(kind)
    content["checkpoint"] = {"every": 1}
    survives_kills(runs, recipe_file, content, [content["objective"]["name"]], kills=25)
