"""Runs that do not belong together are not averaged, and a table says what its columns are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligndistil.errors import UserError
from aligndistil.report import Comparison, RewardResult, combine, read_runs, write_report
from aligndistil.report.tables import BY_METRIC
from support.finished_runs import STEPS, finished_run, table, trl_run


def combined(*paths: Path) -> Comparison:
    return combine(read_runs(paths))[0]


@pytest.mark.parametrize("unlike", [{"measured_on": "other"}, {"kl_to": "builtin:tiny"}, {"reward": "a/b"}])
def test_seeds_that_were_measured_differently_are_rows_of_their_own(tmp_path: Path, unlike: dict[str, str]) -> None:
    rows = table(finished_run(tmp_path / "a"), finished_run(tmp_path / "b", seed=1, **unlike))
    assert {"a/policy", "b/policy"} <= rows.keys()
    assert all(not row.per_seed for row in rows.values())


def test_in_a_folder_of_seeds_they_are_refused(tmp_path: Path) -> None:
    for k in range(2):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k, measured_on=f"pairs {k}")
    with pytest.raises(
        UserError, match=r"its seeds were not measured on the same .*; `aligndistil compare RECIPE --seeds"
    ):
        read_runs([tmp_path / "run"])


def test_a_report_of_models_that_were_trained_again_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", weights={"dpo": "dpo 0", "policy": "what it was"})
    with pytest.raises(UserError, match=r"run: policy was trained again after the models were measured; `aligndistil"):
        read_runs([run])


def test_a_seed_that_is_not_finished_is_named(tmp_path: Path) -> None:
    for k in range(3):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k)
    (tmp_path / "run" / "seed-1" / "report" / "comparison.json").unlink()
    table = combined(tmp_path / "run")
    assert table.notes == [f"{tmp_path / 'run'}: seed-1 is not finished, and is left out."]
    assert list(table.results[1].per_seed) == ["seed-0", "seed-2"]


def test_a_stage_is_no_run_and_the_sentence_names_its_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"run/policy is a stage: compare its run, .*run$"):
        read_runs([run / "policy"])


def test_models_of_one_name_that_differ_are_said_to(tmp_path: Path) -> None:
    other = {"dpo": "another", "policy": "another"}
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", beta=0.3)
    assert str(combined(a, b).kl_to) == "dpo"
    for name in other:
        done = b / name / "done.json"
        done.write_text(json.dumps(json.loads(done.read_text()) | {"weights": "another"}))
    report = b / "report" / "comparison.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"weights": other}))
    table = combined(a, b)
    assert str(table.kl_to) == "each run's own dpo"
    assert table.notes == [
        "What is measured with each run's own dpo cannot be compared between runs: it is another model in each."
    ]


def scored(folder: Path, beta: float, reward: str, score: float) -> Path:
    for k in range(2):
        finished_run(folder / f"seed-{k}", seed=k, beta=beta, reward=reward, score=score + k / 100)
    return folder


def test_scores_of_different_reward_models_have_no_best(tmp_path: Path) -> None:
    column = BY_METRIC["reward_score"]
    runs = [scored(tmp_path / name, beta, name, beta) for name, beta in (("a", 0.1), ("b", 0.3))]
    table = combined(*runs)
    assert column.heading(table) == "score by each run's own model"
    assert "reward_score" not in {one.metric for one in table.differences}
    assert "reward_score" not in table.best


def test_the_reward_model_keeps_its_name_beside_runs_without_one(tmp_path: Path) -> None:
    runs = [scored(tmp_path / "a", 0.1, "judge", 0.5), trl_run(tmp_path / "trl")]
    assert str(combined(*runs).reward) == "judge"


def test_a_trainer_of_the_same_name_is_called_by_its_folder(tmp_path: Path) -> None:
    table = combined(finished_run(tmp_path / "run"), trl_run(tmp_path / "x" / "dpo"), trl_run(tmp_path / "y" / "dpo"))

    assert table.notes[-1].startswith("x/dpo, y/dpo: the last values")
    assert {"x/dpo", "y/dpo"} <= {row.name for row in table.results}


def test_an_evaluation_after_the_training_does_not_hide_what_it_took(tmp_path: Path) -> None:
    run = trl_run(tmp_path / "trl")
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"].append({"step": 20, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    (run / "trainer_state.json").write_text(json.dumps(state))
    metrics = table(run)["trl"].metrics
    assert (metrics["seconds"], metrics["rewards/accuracies"]) == (12.5, 0.7)


def test_a_row_without_the_log_of_a_seed_has_no_steps(tmp_path: Path) -> None:
    for k in range(3):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k)
        finished_run(tmp_path / "other" / f"seed-{k}", seed=k, beta=0.3)
    (tmp_path / "run" / "seed-2" / "policy" / "metrics.jsonl").unlink()
    rows = table(tmp_path / "run", tmp_path / "other")
    assert "steps_to_reward" in rows["other/policy"].metrics
    assert "steps_to_reward" not in rows["run/policy"].metrics


def test_a_row_that_begins_beyond_the_threshold_has_no_steps(tmp_path: Path) -> None:
    wanted = {"threshold_metric": "reward/token_mean", "threshold_value": 0.1}
    runs = [
        finished_run(tmp_path / name, beta=beta, rises=rises, **wanted)
        for name, beta, rises in (("a", 1, 0.01), ("b", 2, 1))
    ]
    rows = table(*runs)
    assert rows["a/policy"].metrics["steps_to_reward"] == pytest.approx(10, abs=1)
    assert "steps_to_reward" not in rows["b/policy"].metrics


def test_what_the_recipe_asked_to_count_is_kept(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    report = run / "report" / "comparison.json"
    asked = {"threshold_metric": "eval/gold_reward", "notes": ["No steps to a reward: no two stages have it."]}
    report.write_text(json.dumps(json.loads(report.read_text()) | asked))
    table = combined(run)
    assert table.threshold is None
    assert table.notes == ["No steps to a reward: no two stages have a curve of eval/gold_reward that rises."]
    asked = {"threshold_metric": "reward/token_mean", "threshold_value": 0.01 * STEPS / 2, "notes": []}
    report.write_text(json.dumps(json.loads(report.read_text()) | asked))
    table = combined(run)
    assert table.threshold is not None
    assert table.threshold.value == 0.01 * STEPS / 2


def test_two_runs_of_one_seed_in_a_folder_keep_their_own_rows(tmp_path: Path) -> None:
    for k in range(2):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=0)
    rows, logs = table(tmp_path / "run"), combine(read_runs([tmp_path / "run"]))[1]
    assert list(rows) == ["initial", "seed-0/dpo", "seed-0/policy", "seed-1/dpo", "seed-1/policy"]
    assert all(len(logs[f"seed-{k}/policy"]) == 1 for k in range(2))


def test_files_of_a_report_that_stood_there_before_are_removed(tmp_path: Path) -> None:
    combined_, logs = combine(read_runs([finished_run(tmp_path / "run")]))
    reward = RewardResult(name="a", kind="score", right={"eval": ["10"]})
    write_report(tmp_path / "report", combined_.model_copy(update={"rewards": [reward], "show_rewards": True}), logs)
    assert (tmp_path / "report" / "reward_accuracy.csv").is_file()
    (tmp_path / "report" / "samples").mkdir()
    written = write_report(tmp_path / "report", combined_.model_copy(update={"results": []}), {})
    left = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert left == sorted([*(path.name for path in written), "samples"])


def test_values_of_another_measurement_than_the_table_s_are_not_taken(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "gold_reward" in table(run)["policy"].errors
    kept = run / "report" / "models" / "policy.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"values": {"gold_reward": [0.123, 0.1]}}))
    assert "gold_reward" not in table(run)["policy"].errors
    kept.write_text("{")
    assert "gold_reward" not in table(run)["policy"].errors
