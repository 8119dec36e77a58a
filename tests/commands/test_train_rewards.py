"""Recipes with a reward, from beginning to end: one that a stage trains, and one that is the user's function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aligndistil import cli
from aligndistil.commands.train import Finished, run_recipe
from aligndistil.errors import EXIT_USAGE, UserError
from aligndistil.recipe import load_recipe
from support.recipes import actor_critic, off_policy, scoring, unpaired
from support.run_folders import lines

ModelFolder = Callable[..., str]
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
LENGTH = "def words(*, responses, **told):\n    return [len(response.split()) - 3 for response in responses]\n"


@pytest.fixture
def rewarded(recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]) -> Path:
    """A reward model and the policy that it scores; the critic starts from it too."""
    model, data = model_folder(seed=0), pairs_file(10)
    policy = actor_critic(model, "stage:scores", "stage:scores", data)
    own = {key: policy[key] for key in ("objective", "models", "rollout")}
    shared = {key: value for key, value in off_policy(model, data).items() if key not in ("objective", "models")}
    stages = {"scores": {"objective": scoring(model, data)["objective"]}, "policy": own}
    return recipe_file({**shared, "train": {**shared["train"], "max_steps": 6}, "stages": stages})


@pytest.fixture
def coded(
    recipe_file: Callable[..., Path],
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A policy whose reward is a function in a file beside the recipe."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    content = actor_critic(model_folder(seed=0), "python:my_words:words", model_folder(seed=4), pairs_file(10))
    content["evaluation"] = {}
    recipe = recipe_file({**content, "logging": {"every": 1}, "train": {**content["train"], "max_steps": 4}})
    (recipe.parent / "my_words.py").write_text(LENGTH)
    yield recipe
    sys.modules.pop("my_words", None)


def run(recipe: Path, *overrides: str, **options: Any) -> Finished:
    return run_recipe(load_recipe(recipe, overrides), **options)


def text_of(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_reward_model_and_its_policy_are_trained_skipped_and_trained_again(
    rewarded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(rewarded)
    AutoModelForCausalLM.from_pretrained(done.final)
    AutoModelForSequenceClassification.from_pretrained(done.run / "scores" / "final")
    assert [line["step"] for line in lines(done.run / "policy") if line["split"] == "eval"] == [0, 4, 6]
    # A scalar head answers no prompts, though the recipe asks for three answers at each evaluation.
    assert not list((done.run / "scores" / "samples").glob("*")) or not (done.run / "scores" / "samples").exists()
    assert all("completions/mean_length" not in line for line in lines(done.run / "scores"))
    capsys.readouterr()
    run(rewarded)
    assert text_of(capsys).count("finished and unchanged, skipped") == 2
    content = yaml.safe_load(rewarded.read_text())
    content["stages"]["scores"]["train"] = {"learning_rate": 2e-3}
    rewarded.write_text(yaml.safe_dump(content, sort_keys=False))
    run(rewarded)
    told = text_of(capsys)
    assert "scores: trained again because train.learning_rate changed from 0.001 to 0.002" in told
    assert "policy: trained again because" in told


def test_every_metric_of_these_objectives_is_in_the_documentation(
    rewarded: Path, recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]
) -> None:
    run(rewarded, "train.max_steps=4", stage="policy")
    run(recipe_file(unpaired(model_folder(seed=0), pairs_file(10), train={"max_steps": 2}), "kto.yaml"), stage="kto")
    tokens = actor_critic(model_folder(seed=0), model_folder(seed=3, scalar=True), model_folder(seed=4), pairs_file(10))
    tokens["objective"] = {"name": "rto", "version": "v3"}
    tokens["models"]["teacher"] = model_folder(seed=1)
    run(recipe_file({**tokens, "train": {**tokens["train"], "max_steps": 4}}, "rto.yaml"), stage="rto")
    runs = rewarded.parent / "runs"
    folders = [runs / "toy" / "scores", runs / "toy" / "policy", runs / "kto" / "kto", runs / "rto" / "rto"]
    logged = {key for folder in folders for line in lines(folder) for key in line}
    assert {"rewards/desirable", "objective/rewards_teacher", "scores/square", "critic/grad_norm"} <= logged
    assert {name for name in logged - {"split"} if f"`{name}`" not in DOCUMENTED} == set()


def test_code_is_run_only_when_it_is_permitted(
    coded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = r"toy.yaml:\d+:\d+: models.reward: python:my_words:words is Python code; add --allow-code to run it"
    with pytest.raises(UserError, match=sentence):
        run(coded)
    assert "my_words" not in sys.modules
    assert not (coded.parent / "runs").exists()
    for options, code in (([], EXIT_USAGE), (["--allow-code"], 0)):
        monkeypatch.setattr(sys, "argv", ["aligndistil", "train", str(coded), "--stage", "ppo", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
        assert ("add --allow-code to run it" in capsys.readouterr().err) is bool(code)
    assert (coded.parent / "runs" / "toy" / "ppo" / "final").is_dir()


def test_a_function_scores_what_the_policy_says_and_its_text_decides_what_is_trained_again(
    coded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(coded, stage="ppo", allow_code=True)
    first = next(line for line in lines(done.run / "ppo") if line["split"] == "train")
    file = done.run / "ppo" / "samples" / "step-000001.jsonl"
    responses = [json.loads(line)["response"] for line in file.read_text().splitlines()]
    assert len(responses) == 8
    assert first["objective/scores"] == pytest.approx(sum(len(r.split()) - 3 for r in responses) / 8)
    capsys.readouterr()
    run(coded, stage="ppo", allow_code=True)
    assert "finished and unchanged, skipped" in text_of(capsys)
    (coded.parent / "my_words.py").write_text(LENGTH.replace("- 3", "- 2"))
    sys.modules.pop("my_words")
    run(coded, stage="ppo", allow_code=True)
    assert "trained again because its data, its models or this package changed" in text_of(capsys)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("python:my_verbs:words", "there is no module 'my_verbs' for python:my_verbs:words; start in the folder"),
        ("python:my_words:verbs", "module 'my_words' has no function 'verbs', which python:my_words:verbs names"),
    ],
)
def test_a_function_that_is_not_there_is_noticed_before_any_stage_is_trained(
    path: str, sentence: str, coded: Path
) -> None:
    with pytest.raises(UserError, match=f"^--set: models.reward: {sentence}"):
        run(coded, f"models.reward={path}", allow_code=True)
    assert not (coded.parent / "runs").exists()


def run_here(recipe: str, overrides: list[str]) -> None:
    run_recipe(load_recipe(Path(recipe), overrides))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_give_the_rounds_of_one(rewarded: Path, on_processes: Callable[..., list[Any]]) -> None:
    settings = ["logging.every=1", "train.micro_batch_size=1", "engine.zero_stage=3"]
    one = run(rewarded, *settings, "output_dir=one").run
    on_processes(run_here, str(rewarded), [*settings, "output_dir=two"], timeout=300)
    for stage in ("scores", "policy"):
        ours, theirs = lines(one / stage), lines(rewarded.parent / "two" / stage)
        assert [line.pop("split") for line in ours] == [line.pop("split") for line in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4, rel=1e-3)
