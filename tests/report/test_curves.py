"""Training logs from disk, ours and TRL's, and the curves made of them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligndistil.errors import UserError
from aligndistil.report import curves_of, read_methods, steps_to
from aligndistil.report.curves import Curve, default_reach, moving_average, smoothed
from aligndistil.report.logs import read_logs

Lines = list[dict[str, Any]]


def sampled(values: list[float], seconds: float = 2.0) -> Lines:
    """Training lines of a stage that samples: 10 tokens and `seconds` a step."""
    return [
        {
            "step": step,
            "split": "train",
            "reward/token_mean": value,
            "completions/mean_length": 20.0 + step,
            "num_tokens": 10 * step,
            "perf/step_seconds": seconds,
        }
        for step, value in enumerate(values, start=1)
    ]


def log_of(folder: Path, lines: Lines, name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def curve(label: str, values: list[list[float]], steps: list[float] | None = None) -> Curve:
    at = np.array(steps or range(1, len(values[0]) + 1), dtype=float)
    return Curve(label, at, np.tile(at, (len(values), 1)), np.array(values, dtype=float))


# As Trainer.save_state writes it after TRL's DPOTrainer: steps, an evaluation, a NaN, and the summary at the end.
TRAINER_STATE = """{
  "best_metric": null, "epoch": 1.0, "global_step": 20, "is_world_process_zero": true,
  "log_history": [
    {"epoch": 0.5, "grad_norm": 9.3, "learning_rate": 4.5e-07, "logits/chosen": NaN, "logps/chosen": -51.0,
     "loss": 0.6913, "num_tokens": 5120.0, "rewards/accuracies": 0.5, "rewards/margins": 0.004, "step": 10},
    {"epoch": 0.5, "eval_loss": 0.6871, "eval_rewards/accuracies": 0.625, "eval_runtime": 3.1,
     "eval_samples_per_second": 20.6, "eval_steps_per_second": 2.6, "step": 10},
    {"epoch": 1.0, "grad_norm": 8.1, "learning_rate": 1e-08, "logps/chosen": -50.2, "loss": 0.6702,
     "num_tokens": 10344.0, "rewards/accuracies": 0.8, "rewards/margins": 0.051, "step": 20},
    {"epoch": 1.0, "step": 20, "total_flos": 0.0, "train_loss": 0.68, "train_runtime": 61.2,
     "train_samples_per_second": 2.6, "train_steps_per_second": 0.33}
  ],
  "logging_steps": 10, "max_steps": 20, "num_input_tokens_seen": 0, "train_batch_size": 8
}"""


# ---- reading


def test_a_run_folder_gives_its_stages_and_leaves_archived_ones_out(tmp_path):
    for stage in ("dpo", "aligndistil", "dpo.old-1"):
        log_of(tmp_path / "run" / stage, sampled([0.1]))
    (tmp_path / "run" / "report").mkdir()
    logs = read_logs(tmp_path / "run")
    assert [(log.run, log.stage, log.seed) for log in logs] == [("run", "aligndistil", ""), ("run", "dpo", "")]
    assert logs[0].lines[0]["reward/token_mean"] == 0.1


def test_a_stage_folder_and_its_file_are_the_same_log(tmp_path):
    path = log_of(tmp_path / "run" / "dpo", sampled([0.1, 0.2]))
    for given in (path, path.parent):
        (log,) = read_logs(given)
        assert (log.path, log.run, log.stage, len(log.lines)) == (path, "run", "dpo", 2)


def test_a_log_that_is_given_twice_is_refused_whatever_it_is_called(tmp_path):
    path = log_of(tmp_path / "run" / "dpo", sampled([0.1, 0.2]))
    for twice in ([path, path.parent], [f"a={path.parent}", f"b={path.parent}"], [tmp_path / "run", path]):
        with pytest.raises(UserError, match=f"{path.parent} was given twice"):
            read_methods(twice)


def test_seeds_that_are_given_different_labels_are_different_methods(tmp_path):
    for seed in (0, 1):
        log_of(tmp_path / f"seed-{seed}" / "dpo", sampled([seed]))
    methods = read_methods([f"first={tmp_path / 'seed-0'}", f"second={tmp_path / 'seed-1'}"])
    assert [(method.names[0], len(method.logs)) for method in methods] == [("first", 1), ("second", 1)]


def test_folders_of_seeds_are_one_method_in_the_order_of_numbers(tmp_path):
    for seed in (10, 2):
        log_of(tmp_path / "out" / f"seed-{seed}" / "dpo", sampled([seed]))
    for given in ([tmp_path / "out"], [tmp_path / "out" / "dpo"], sorted((tmp_path / "out").glob("seed-*"))):
        (method,) = read_methods(given)
        assert {log.seed for log in method.logs} == {"seed-2", "seed-10"}
        assert method.names[0] == "dpo"
    assert [log.seed for log in read_logs(tmp_path / "out")] == ["seed-2", "seed-10"]


def test_trls_log_is_read_with_its_evaluations_apart(tmp_path):
    (tmp_path / "trl-dpo").mkdir()
    (tmp_path / "trl-dpo" / "trainer_state.json").write_text(TRAINER_STATE)
    (log,) = read_logs(tmp_path / "trl-dpo")
    assert [(line["step"], line["split"]) for line in log.lines] == [(10, "eval"), (10, "train"), (20, "train")]
    evaluated, first, last = log.lines
    assert evaluated == {"step": 10, "split": "eval", "loss": 0.6871, "rewards/accuracies": 0.625}
    assert first["rewards/margins"] == 0.004
    assert "logits/chosen" not in first  # it is NaN
    assert last["num_tokens"] == 10344.0
    assert not {"train_loss", "train_runtime", "total_flos"} & last.keys()
    ((one,), notes) = curves_of(read_methods([tmp_path / "trl-dpo"]), "rewards/margins", "tokens")
    assert (one.label, one.x.tolist(), one.values.tolist()) == ("trl-dpo", [[5120.0, 10344.0]], [[0.004, 0.051]])
    assert notes == []


def test_without_its_own_trainer_state_a_folder_gives_that_of_its_last_checkpoint(tmp_path):
    for step in (9, 20, 100):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 0.5, "step": step}]}))
    (log,) = read_logs(tmp_path / "out")
    assert log.lines == [{"step": 100, "split": "train", "loss": 0.5}]
    (direct,) = read_logs(tmp_path / "out" / "checkpoint-20" / "trainer_state.json")
    assert (direct.run, direct.lines[0]["step"]) == ("out", 20)


def test_names_of_transformers_become_ours(tmp_path):
    entry = {"num_input_tokens_seen": 64, "step_time": 1.5, "completions/clipped_ratio": 0.25, "reward": 2.0, "step": 4}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
    (log,) = read_logs(tmp_path)
    named = {"num_tokens": 64.0, "perf/step_seconds": 1.5, "completions/truncated_fraction": 0.25, "reward": 2.0}
    assert log.lines == [{"step": 4, "split": "train", **named}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", "no json\n", "this line is none that aligndistil writes"),
        ("metrics.jsonl", '{"loss": 1}\n', "this line is none that aligndistil writes"),
        ("metrics.jsonl", "[1]\n", "this line is none that aligndistil writes"),
        ("trainer_state.json", '{"epoch": 1}', "has no `log_history` of steps"),
        ("trainer_state.json", '{"log_history": [3]}', "has no `log_history` of steps"),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_logs(tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_what_is_not_there_or_holds_no_log_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_logs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no training log: give a run folder"):
        read_logs(tmp_path)
    with pytest.raises(UserError, match="give at least one run"):
        read_methods([])


# ---- curves


def test_seeds_give_their_mean_and_its_standard_error(tmp_path):
    for seed, values in enumerate(([1.0, 4.0], [2.0, 4.0], [6.0, 7.0])):
        log_of(tmp_path / f"seed-{seed}" / "a", sampled(values))
    ((one,), notes) = curves_of(read_methods([tmp_path]), "reward/token_mean")
    assert one.seeds == 3
    assert one.mean.tolist() == [3.0, 5.0]
    # Deviations from the means: (-2, -1, 3) and (-1, -1, 2); their squares sum to 14 and 6, divided by 3 - 1.
    assert one.error == pytest.approx([(7 / 3) ** 0.5, 1.0])
    assert notes == []


def test_one_seed_has_no_error(tmp_path):
    log_of(tmp_path / "a", sampled([1.0, 2.0]))
    assert curves_of(read_methods([tmp_path]), "reward/token_mean").curves[0].error is None


def test_a_seed_that_stops_early_ends_the_mean_and_is_named(tmp_path):
    log_of(tmp_path / "seed-0" / "a", sampled([1.0, 2.0, 3.0]))
    log_of(tmp_path / "seed-1" / "a", sampled([3.0, 4.0]))
    log_of(tmp_path / "seed-2" / "a", [{"step": 1, "split": "train", "loss": 1.0}])
    ((one,), notes) = curves_of(read_methods([tmp_path]), "reward/token_mean")
    assert one.mean.tolist() == [2.0, 3.0]
    assert "seed-2 has no `reward/token_mean` yet" in notes[0]
    assert "ends at step 2, where its shortest seed does (the longest: 3)" in notes[1]


def test_x_is_tokens_or_seconds_so_far_also_for_evaluations_and_gaps(tmp_path):
    lines = [line for line in sampled([0.0] * 6) if line["step"] in (2, 3, 6)]
    lines += [{"step": step, "split": "eval", "loss": 1.0} for step in (0, 3, 5)]
    log_of(tmp_path / "a", lines)
    methods = read_methods([tmp_path])
    assert curves_of(methods, "reward/token_mean", "tokens").curves[0].x.tolist() == [[20.0, 30.0, 60.0]]
    # 2 s a step; the line of step 2 stands for two steps, that of step 6 for three.
    assert curves_of(methods, "reward/token_mean", "seconds").curves[0].x.tolist() == [[4.0, 6.0, 12.0]]
    assert curves_of(methods, "eval/loss", "seconds").curves[0].x.tolist() == [[0.0, 6.0, 10.0]]


def test_x_may_be_another_metric_of_the_same_step(tmp_path):
    log_of(tmp_path / "a", [*sampled([0.5, 0.7]), {"step": 3, "split": "train", "loss": 2.0}])
    one = curves_of(read_methods([tmp_path]), "reward/token_mean", "completions/mean_length").curves[0]
    assert (one.x.tolist(), one.values.tolist()) == ([[21.0, 22.0]], [[0.5, 0.7]])


def test_the_reward_of_given_responses_is_left_out_and_said_so(tmp_path):
    given = [{"step": 1, "split": "train", "reward/token_mean": 0.1, "kl/policy_teacher": 1.0}]
    evaluated = {"step": 1, "split": "eval", "reward/token_mean": 9.0, "completions/mean_length": 3.0}
    log_of(tmp_path / "run" / "on", [*sampled([0.5]), evaluated])
    log_of(tmp_path / "run" / "off", given)
    found, notes = curves_of(read_methods([tmp_path / "run"]), "reward/token_mean")
    assert [(one.label, one.values.tolist()) for one in found] == [("on", [[0.5]])]
    assert notes == [
        "run/off: its `reward/token_mean` is of given responses and does not depend on the policy: left out"
    ]
    with pytest.raises(UserError, match="only of given responses, and does not depend on the policy"):
        curves_of(read_methods([tmp_path / "run" / "off"]), "reward/token_mean")
    with pytest.raises(UserError, match="`eval/reward/token_mean` is here only of given responses"):
        curves_of(read_methods([tmp_path / "run"]), "eval/reward/token_mean")
    assert curves_of(read_methods([tmp_path / "run"]), "kl/policy_teacher").curves[0].label == "off (off-policy)"


def test_a_missing_metric_names_what_is_there_nearest_first(tmp_path):
    log_of(tmp_path / "a", [*sampled([0.5]), {"step": 1, "split": "eval", "loss": 1.0, "gold_reward": 0.1}])
    with pytest.raises(UserError) as error:
        curves_of(read_methods([tmp_path]), "reward/token_meen")
    text = str(error.value)
    assert "did you mean `reward/token_mean`?" in text
    assert "The metrics are `reward/token_mean`, " in text
    for name in ("completions/mean_length", "num_tokens", "perf/step_seconds", "eval/loss", "eval/gold_reward"):
        assert f"`{name}`" in text
    with pytest.raises(UserError, match=r"--x: .* has `steps`; did you mean `step`\?"):
        curves_of(read_methods([tmp_path]), "reward/token_mean", "steps")


def test_a_log_without_seconds_and_an_empty_log_say_so(tmp_path):
    log_of(tmp_path / "a", [{"step": 1, "split": "train", "loss": 1.0}])
    with pytest.raises(UserError, match="--x seconds: the logs do not say how many seconds a step took"):
        curves_of(read_methods([tmp_path]), "loss", "seconds")
    log_of(tmp_path / "b", sampled([0.1]))
    log_of(tmp_path / "empty", [])
    with pytest.raises(UserError, match="nothing has been logged yet"):
        curves_of(read_methods([tmp_path / "empty"]), "loss")
    found, notes = curves_of(read_methods([tmp_path / "b", tmp_path / "empty"]), "num_tokens")
    assert len(found) == 1
    assert notes == [f"{tmp_path / 'empty'} has no `num_tokens`: it is left out"]


def test_labels_are_as_short_as_tells_them_apart(tmp_path):
    for run in ("one", "two"):
        log_of(tmp_path / run / "dpo", sampled([0.1]))
    log_of(tmp_path / "two" / "simpo", sampled([0.1]))

    def labels(*runs: object) -> list[str]:
        return [one.label for one in curves_of(read_methods([str(run) for run in runs]), "num_tokens").curves]

    one, two = tmp_path / "one", tmp_path / "two"
    assert labels(two) == ["dpo", "simpo"]
    assert labels(one, two / "dpo") == ["one", "two"]
    assert labels(one, two) == ["one/dpo", "two/dpo", "simpo"]
    assert labels(f"AlignDistil={one}", f"DPO, beta 0.1={two / 'dpo'}") == ["AlignDistil", "DPO, beta 0.1"]
    assert labels(f"mine={two}") == ["mine/dpo", "mine/simpo"]
    assert labels(f"mine={two}", f"AlignDistil={one}") == ["mine/dpo", "mine/simpo", "AlignDistil"]


def test_only_those_of_the_same_name_get_a_longer_one_and_it_is_not_of_a_seed(tmp_path):
    for seed, folder in itertools.product((0, 1), ("a/out", "b/out")):
        log_of(tmp_path / folder / f"seed-{seed}" / "dpo", sampled([0.1]))
    log_of(tmp_path / "b" / "out" / "seed-0" / "kto", sampled([0.1]))
    found = curves_of(read_methods([tmp_path / "a" / "out", tmp_path / "b" / "out"]), "num_tokens").curves
    assert [one.label for one in found] == ["a/out/dpo", "b/out/dpo", "kto"]


def test_a_moving_average_takes_what_is_within_reach_on_either_side():
    at = np.array([1.0, 2.0, 3.0, 10.0])
    values = np.array([[0.0, 3.0, 6.0, 1.0], [1.0, 1.0, 1.0, 5.0]])
    assert moving_average(at, values, 1).tolist() == [[1.5, 3.0, 4.5, 1.0], [1.0, 1.0, 1.0, 5.0]]
    assert moving_average(at, values, 0).tolist() == values.tolist()


def reaches(*curves: Curve, windows: int = 12) -> list[float]:
    return default_reach(curves, windows)


def test_by_default_all_curves_are_smoothed_over_a_twelfth_of_the_usual_length():
    long, short = curve("long", [[0.0] * 481]), curve("short", [[0.0] * 97])
    assert reaches(long, short) == [4, 4]  # 96 // 24 on either side, of the shorter of two
    assert reaches(long, long, short) == [20, 20, 4]  # a short one sets its own window only
    assert reaches(long, windows=4) == [60]
    assert reaches(curve("few", [[0.0] * 23])) == [0]
    assert reaches(curve("few", [[0.0] * 24])) == [0]  # 23 // 24
    assert reaches(curve("far apart", [[0.0] * 3], [0, 50, 100])) == [0]


def test_a_curve_that_has_just_begun_leaves_the_others_smooth():
    begun = curve("begun", [[0.0] * 3])
    assert reaches(*[curve("done", [[0.0] * 94])] * 2, begun) == [3, 3, 0]
    assert smoothed([curve("done", [[0.0] * 94]), curve("begun", [[1.0, 5.0, 0.0]])])[1].values.tolist() == [
        [1.0, 5.0, 0.0]
    ]


def test_a_curve_of_every_fourth_step_is_averaged_over_its_neighbours():
    every = curve("every step", [[0.0] * 94])
    fourth = curve("every fourth", [[0.0, 6.0] * 12], [1.0 + 4 * i for i in range(24)])
    assert reaches(every, fourth) == [3, 4]
    assert smoothed([every, fourth])[1].values[0, :3].tolist() == [3.0, 2.0, 4.0]
    assert fourth.smoothed(3).values.tolist() == fourth.values.tolist()  # what is asked for is what is done


# ---- thresholds


def test_steps_to_the_default_threshold_and_their_ratios():
    slow, fast = curve("slow", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]), curve("fast", [[0, 5, 10, *[20] * 8]])
    flat = curve("flat", [[0] * 11])
    threshold = steps_to([slow, fast, flat])
    assert threshold is not None
    assert threshold.value == 9.0  # from 0, 90 % of the way to 10, the lowest of the ends that rise
    assert [(one.label, one.x, one.ratio) for one in threshold.reached] == [
        ("slow", 10.0, pytest.approx(10 / 3)),
        ("fast", 3.0, 1.0),
        ("flat", None, None),
    ]
    assert [one.label for one in threshold.fastest_first] == ["fast", "slow", "flat"]


def test_thresholds_count_in_x_and_for_each_seed():
    one = Curve(
        "a", np.array([1.0, 2.0, 3.0]), np.array([[10.0, 20.0, 30.0], [14.0, 24.0, 34.0]]),
        np.array([[0.0, 4.0, 4.0], [0.0, 0.0, 3.0]]),
    )  # fmt: skip
    threshold = steps_to([one], 2.0)
    assert threshold is not None
    assert threshold.reached[0].x == 22.0  # the mean is 2 at the second point
    assert threshold.reached[0].seeds == (20.0, 34.0)


def test_a_threshold_below_the_start_is_approached_from_above():
    threshold = steps_to([curve("loss", [[3, 2, 1]]), curve("slow", [[3, 3, 2.5]])], 2.0)
    assert threshold is not None
    assert [one.x for one in threshold.reached] == [2.0, None]


def test_a_curve_that_starts_beyond_the_threshold_gives_no_ratio():
    threshold = steps_to([curve("there", [[5, 6]]), curve("later", [[0, 6]])], 4.0)
    assert threshold is not None
    assert [(one.from_the_start, one.ratio) for one in threshold.reached] == [(True, None), (False, None)]


def test_without_a_rise_there_is_no_default_threshold():
    assert steps_to([curve("a", [[2, 1]]), curve("b", [[2, 2]])]) is None
