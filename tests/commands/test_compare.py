"""`aligndistil compare` from beginning to end, on random models: what is trained, measured, averaged and refused."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligndistil.cli import main
from aligndistil.commands import measure
from aligndistil.errors import EXIT_USAGE
from aligndistil.report import load_results
from support.recipes import merged, three_stages

Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Exit code, stdout and stderr, each without line breaks."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aligndistil", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join(captured.out.split()), " ".join(captured.err.split())

    return call


@pytest.fixture
def recipe(recipe_file: Callable[..., Path], model_folder: Callable[..., str], pairs_file: Callable[..., str]) -> Path:
    """Two opposite DPO models, a policy between them, and a scalar head."""
    content = three_stages(model_folder(seed=0), pairs_file(10))
    over = {
        "train": {"max_steps": 2},
        "evaluation": {"every": None, "samples": 0},
        "logging": {"every": 1},
        "report": {"samples": 4, "pairs": 4, "reward_accuracy": True},
        "stages": {"scorer": {"objective": {"name": "reward_model"}}},
    }
    return recipe_file(merged(content, over))


def lines(stage: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (stage / "metrics.jsonl").read_text().splitlines()))


def test_seeds_are_trained_once_measured_alike_and_averaged(
    recipe: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = compare(recipe, "--seeds", 2)
    assert code == 0, err
    assert "Mean ± standard error over 2 seeds" in out
    run = Path("runs/toy")
    for k in range(2):
        resolved = yaml.safe_load((run / f"seed-{k}" / "policy" / "recipe.resolved.yaml").read_text())
        assert resolved["train"]["seed"] == k
    check_numbers(run)
    check_rewards(run)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "load_model", refuse)
    before = (run / "report" / "comparison.json").read_bytes()
    code, out, err = compare(recipe, "--seeds", 2, "--out", "elsewhere")
    assert code == 0, err
    assert out.count("finished and unchanged, skipped") == 8
    assert Path("elsewhere/comparison.json").read_bytes() == before
    assert compare(run)[0] == 0
    assert (run / "report" / "comparison.json").read_bytes() == before
    check_of_runs(run, compare)


def check_numbers(run: Path) -> None:
    """Every number of the table is one of done.json, metrics.jsonl or what was measured of the model."""
    rows = {row.name: row for row in load_results(run / "report" / "comparison.json").results}
    assert list(rows) == ["initial", "dpo", "reverse", "policy", "scorer"]
    for name, row in rows.items():
        for k in range(2):
            found = row.per_seed[f"seed-{k}"]
            measured = json.loads((run / f"seed-{k}" / "report" / "models" / f"{name}.json").read_text())["metrics"]
            assert {key: found[key] for key in measured} == measured
            if name == "initial":
                continue
            stage = run / f"seed-{k}" / name
            done = json.loads((stage / "done.json").read_text())
            assert (found["steps"], found["seconds"]) == (done["step"], done["seconds"])
            training = [line for line in lines(stage) if line["split"] == "train"]
            steps = [0, *(line["step"] for line in training)]
            seconds = sum(
                line["perf/step_seconds"] * (after - before)
                for line, before, after in zip(training, steps, steps[1:], strict=False)
            )
            assert found["tokens_per_second"] == pytest.approx(training[-1]["num_tokens"] / seconds)
            assert found["peak_memory_gib"] == max(line["perf/peak_memory_gib"] for line in training)
        seeds = [row.per_seed[f"seed-{k}"] for k in range(2)]
        for metric, mean in row.metrics.items():
            assert mean == pytest.approx(statistics.fmean(seed[metric] for seed in seeds), abs=1e-12)
            assert row.spread[metric] == pytest.approx(statistics.stdev(seed[metric] for seed in seeds), abs=1e-12)
    assert set(rows["scorer"].metrics) == {
        "rewards/accuracies",
        "steps",
        "seconds",
        "compute_seconds",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert {"kl", "kl_data", "reward_score", "distinct_1"} <= set(rows["policy"].metrics)
    assert rows["initial"].spread["completions/mean_length"] == 0  # the same model, prompts and sampling seeds
    (first, *_) = csv.DictReader((run / "report" / "comparison.csv").read_text().splitlines())
    length = rows["initial"].metrics["completions/mean_length"]
    assert float(first["completions/mean_length"]) == length


def check_rewards(run: Path) -> None:
    """They are arithmetic on the log-probabilities and scores that were kept."""
    table = load_results(run / "report" / "comparison.json")
    names = [reward.name for reward in table.rewards]
    assert names == ["dpo / initial", "reverse / initial", "scorer", "dpo / reverse"]
    for k in range(2):
        models = run / f"seed-{k}" / "report" / "models"
        dpo, reverse = (json.loads((models / f"{name}.json").read_text())["pairs"] for name in ("dpo", "reverse"))
        for split in ("eval", "train"):
            worth = [
                [a - b for a, b in zip(*both, strict=True)] for both in zip(dpo[split], reverse[split], strict=True)
            ]
            assert len(worth) == 4
            marks = "".join("1" if chosen > rejected else "0" for chosen, rejected in worth)
            assert table.rewards[3].right[split][k] == marks
    scores = json.loads((run / "seed-0" / "report" / "models" / "scorer.json").read_text())["pairs"]["eval"]
    assert table.row("scorer").per_seed["seed-0"]["rewards/accuracies"] == sum(a > b for a, b in scores) / 4


@pytest.mark.parametrize("given", ["trl", "trl/trainer_state.json"])
def test_another_program_s_folder_is_read_and_left_as_it_is(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: Compare
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trl").mkdir()
    history = [{"step": 5, "loss": 0.7, "rewards/margins": 0.1}, {"step": 5, "eval_rewards/accuracies": 0.61}]
    Path("trl/trainer_state.json").write_text(json.dumps({"log_history": history}))
    code, out, err = compare(given)
    assert code == 0, err
    assert "61.0%" in out
    assert [entry.name for entry in Path("trl").iterdir()] == ["trainer_state.json"]
    assert Path("report/comparison.md").is_file()


def check_of_runs(run: Path, compare: Compare) -> None:
    code, out, err = compare(run / "seed-0", run / "seed-1")
    assert code == 0, err
    assert "over 2 seeds" in out
    assert Path("report/comparison.tex").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["runs/nothing"], "runs/nothing: there is no such run folder, and no recipe of that name"),
        (["nothing.yaml"], "there is no recipe 'nothing.yaml'"),
        (["empty"], "empty holds no training log"),
        (["empty", "toy.yaml"], "toy.yaml is a recipe: compare one recipe, or any number of runs"),
        (["empty", "--seeds", "3"], "--seeds, --processes, --jobs and --allow-code train a recipe"),
        (["toy.yaml", "--set", "data.eval=null"], "nothing to compare on"),
        (["toy.yaml", "--seeds", "2", "--set", "output_dir=empty/.."], "which is no run of ours"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, recipe: Path, compare: Compare
) -> None:
    Path("empty").mkdir()
    code, _, err = compare(*arguments)
    assert code == EXIT_USAGE
    assert sentence in err
    assert err.count("error:") == 1
    assert not Path("runs").exists()


def test_seeds_are_not_put_into_the_run_of_one_seed(recipe: Path, compare: Compare) -> None:
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/environment.json").write_text("{}")
    code, _, err = compare(recipe, "--seeds", 2)
    assert code == EXIT_USAGE
    assert "holds the run of one seed; move it to runs/toy/seed-0" in err


def test_a_seed_of_the_command_line_is_the_first(recipe: Path) -> None:
    from aligndistil.commands.compare import overrides_of_seed
    from aligndistil.recipe import load_recipe

    given = ["train.seed=5", "train.learning_rate=2e-3"]
    base = load_recipe(recipe, given)
    second = load_recipe(recipe, overrides_of_seed(base, given, 1))
    assert {stage.train.seed for stage in second.stages.values()} == {6}
    assert {stage.train.learning_rate for stage in second.stages.values()} == {2e-3}
    assert second.output_dir == base.output_dir / "seed-1"


def test_seeds_side_by_side_are_those_one_after_the_other(recipe: Path, compare: Compare) -> None:
    together, apart = ("--set", "output_dir=together"), ("--set", "output_dir=apart")
    code, out, err = compare(recipe, "--seeds", 2, "--jobs", 2, *together)
    assert code == 0, err
    assert "seed-1: together/seed-1.log" in out
    assert "steps" in Path("together/seed-0.log").read_text()
    assert compare(recipe, "--seeds", 2, *apart)[0] == 0
    tables = [load_results(Path(folder, "report/comparison.json")) for folder in ("together", "apart")]
    unlike = ("seconds", "compute_seconds", "tokens_per_second", "peak_memory_gib")
    first, second = (
        [{k: v for k, v in row.metrics.items() if k not in unlike} for row in table.results] for table in tables
    )
    assert first == second
    assert compare(recipe, "--seeds", 2, "--jobs", 2, *together)[0] == 0


def test_a_seed_that_fails_is_told_with_its_log_and_starts_no_other(recipe: Path, compare: Compare) -> None:
    bad = ("--set", "model.path=./gone", "--set", "output_dir=bad")
    code, _, err = compare(recipe, "--seeds", 3, "--jobs", 2, *bad)
    assert code == EXIT_USAGE
    assert "bad/seed-" in err
    assert not Path("bad/seed-2.log").exists()
    assert not Path("bad/report").exists()
