"""Finished runs, ours and TRL's, put together: numbers are those of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligndistil.errors import UserError
from aligndistil.report import RewardResult, combine, pictures, read_runs, training_metrics
from aligndistil.run_folder import RunFolder
from support.finished_runs import STEPS, finished_run, table, trl_run


def test_what_training_took_is_what_done_json_and_metrics_jsonl_say(tmp_path: Path) -> None:
    stage = RunFolder(finished_run(tmp_path / "run")).stage("policy")
    assert training_metrics(stage.read_done(), stage.metrics.read()) == {
        "steps": STEPS,
        "seconds": 10.0,
        "tokens_per_second": 100.0,  # STEPS * 50 tokens in STEPS * 0.5 seconds
        "peak_memory_gib": 2.0,
    }
    assert training_metrics(None, []) == {}


def test_a_single_run_is_shown_as_it_is(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    rows = table(run)
    assert list(rows) == ["initial", "dpo", "policy"]
    assert rows["policy"].metrics["gold_reward"] == 0.5
    assert rows["policy"].per_seed == {}


def test_a_folder_of_seeds_is_averaged(tmp_path: Path) -> None:
    for k, gold in enumerate((0.4, 0.5, 0.9)):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k, gold=gold)
    policy = table(tmp_path / "run")["policy"]
    assert policy.metrics["gold_reward"] == pytest.approx(0.6)
    assert policy.spread["gold_reward"] == pytest.approx(0.07**0.5)  # (0.04 + 0.01 + 0.09) / 2
    assert policy.metrics["seconds"] == 11.0
    assert {seed: metrics["gold_reward"] for seed, metrics in policy.per_seed.items()} == {
        "seed-0": 0.4,
        "seed-1": 0.5,
        "seed-2": 0.9,
    }


def test_runs_that_differ_in_their_seeds_only_are_averaged_wherever_they_lie(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / f"run-{seed}", seed=seed, gold=float(seed)) for seed in (3, 5)]
    rows = table(*runs)
    assert list(rows) == ["initial", "dpo", "policy"]
    assert rows["policy"].metrics["gold_reward"] == 4.0
    assert list(rows["policy"].per_seed) == ["run-3", "run-5"]


def test_the_same_seed_twice_is_two_runs(tmp_path: Path) -> None:
    rows = table(finished_run(tmp_path / "a"), finished_run(tmp_path / "b"))
    assert list(rows) == ["initial", "a/dpo", "a/policy", "b/dpo", "b/policy"]


def test_different_recipes_keep_their_rows_under_names_that_tell_them_apart(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / side / "run", beta=beta, gold=beta) for side, beta in (("x", 0.1), ("y", 0.3))]
    rows = table(*runs)
    assert list(rows) == ["initial", "x/run/dpo", "x/run/policy", "y/run/dpo", "y/run/policy"]
    assert rows["y/run/policy"].metrics["gold_reward"] == 0.3
    assert rows["y/run/policy"].per_seed == {}


def test_runs_that_were_measured_differently_are_marked(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, beta=beta, measured_on=name) for name, beta in (("a", 0.1), ("b", 0.2))]
    (note,) = combine(read_runs(runs))[0].notes
    assert "not measured on the same prompts and pairs" in note
    same = [finished_run(tmp_path / name, beta=beta) for name, beta in (("c", 0.1), ("d", 0.2))]
    assert combine(read_runs(same))[0].notes == []


def test_seeds_of_different_recipes_are_refused(tmp_path: Path) -> None:
    for k in range(2):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k, beta=0.1 + k)
    with pytest.raises(UserError, match=r"run: its seeds were trained from different recipes"):
        read_runs([tmp_path / "run"])


def test_a_run_without_a_report_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "report" / "comparison.json").unlink()
    with pytest.raises(UserError, match=r"run has no report/comparison.json: the run is not finished"):
        read_runs([run])
    with pytest.raises(UserError, match="no such file or folder"):
        read_runs([tmp_path / "nothing"])


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="run was given twice"):
        read_runs([run, tmp_path / "run" / ".." / "run"])


def test_trl_s_last_values_are_read_under_our_names(tmp_path: Path) -> None:
    (row,) = table(trl_run(tmp_path / "trl-dpo")).values()
    assert row.name == "trl-dpo"
    assert row.metrics["rewards/accuracies"] == 0.65
    assert row.metrics["steps"] == 20
    assert row.metrics["seconds"] == 12.5
    assert row.metrics["rewards/margins"] == 0.3
    assert row.metrics["eval/loss"] == 0.63


def test_ours_and_trl_s_stand_in_one_table_and_it_says_whose_is_whose(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "run"), trl_run(tmp_path / "trl")]
    combined, _ = combine(read_runs(runs))
    assert [row.name for row in combined.results] == ["run/initial", "run/dpo", "run/policy", "trl"]
    assert str(combined.kl_to) == "dpo"
    assert combined.notes == ["trl: the last values that its own trainer logged, on its own data."]


def test_steps_are_counted_to_one_threshold_for_all_runs(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, beta=r, rises=r) for name, r in (("slow", 0.01), ("fast", 0.02))]
    combined, logs = combine(read_runs(runs))
    rows = {row.name: row.metrics for row in combined.results}
    assert combined.threshold is not None
    assert combined.threshold.metric == "reward/token_mean"
    # Both begin near 0.02; nine tenths of the way to the lower end, the slow one's 0.395 after smoothing.
    value = combined.threshold.value
    assert 0.34 < value < 0.38
    assert rows["slow/policy"]["steps_to_reward"] == pytest.approx(2 * rows["fast/policy"]["steps_to_reward"], abs=1)
    assert rows["fast/policy"]["steps_to_reward"] == next(s for s in range(1, 41) if 0.02 * s >= value)
    assert "steps_to_reward" not in rows["slow/dpo"]
    assert {row: list(of) for row, of in logs.items() if row.startswith("fast/p")} == {"fast/policy": ["fast"]}


def test_a_row_whose_seeds_do_not_all_get_there_has_no_steps(tmp_path: Path) -> None:
    for k, rises in enumerate((0.01, 0.02)):
        finished_run(tmp_path / "steep" / f"seed-{k}", seed=k, rises=rises)
        finished_run(tmp_path / "flat" / f"seed-{k}", seed=k, rises=0.012 * k, beta=0.3)
    rows = table(tmp_path / "steep", tmp_path / "flat")
    steps = [metrics["steps_to_reward"] for metrics in rows["steep/policy"].per_seed.values()]
    assert rows["steep/policy"].metrics["steps_to_reward"] == sum(steps) / 2
    assert steps[0] == pytest.approx(2 * steps[1], abs=1)
    assert "steps_to_reward" not in rows["flat/policy"].metrics
    assert "steps_to_reward" in rows["flat/policy"].per_seed["seed-1"]


def test_rewards_of_seeds_are_put_together(tmp_path: Path) -> None:
    for k, bits in enumerate(("1100", "1110")):
        reward = RewardResult(name="dpo / initial", kind="implicit", right={"eval": [bits]})
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k, rewards=[reward])
    (reward,) = combine(read_runs([tmp_path / "run"]))[0].rewards
    assert reward.right == {"eval": ["1100", "1110"]}


def test_the_columns_of_the_runs_are_kept_where_they_agree(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, beta=b, columns=["kl"]) for name, b in (("a", 0.1), ("b", 0.2))]
    assert combine(read_runs(runs))[0].columns == ["kl"]
    other = finished_run(tmp_path / "c", beta=0.3)
    assert combine(read_runs([*runs, other]))[0].columns is None


def test_the_pictures_are_of_the_table_s_own_numbers(tmp_path: Path) -> None:
    for k, gold in enumerate((0.4, 0.6)):
        finished_run(tmp_path / "run" / f"seed-{k}", seed=k, gold=gold)
    combined, logs = combine(read_runs([tmp_path / "run"]))
    drawn = pictures(combined, logs)
    assert list(drawn) == ["convergence.png", "reward.png", "length.png", "frontier.png"]
    by_kl, by_length = drawn["frontier.png"].axes[:2]
    points = [line.get_xydata().tolist()[0] for line in by_kl.lines if line.get_linestyle() == "None"]
    assert [0.0, 0.0] in points  # the initial model
    assert [1.0, pytest.approx(0.5)] in points
    assert by_length.get_xlabel() == "mean length (tokens)"


def test_an_asked_metric_that_no_run_has_is_a_note(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "none", threshold_metric="reward/none", threshold_value=1.0)
    assert combine(read_runs([run]))[0].notes == [
        "No steps to a reward: no two stages have a curve of reward/none that rises."
    ]
    run = finished_run(tmp_path / "given", threshold_metric="reward/token_mean", threshold_value=0.195)
    assert table(run)["policy"].metrics["steps_to_reward"] == 20
