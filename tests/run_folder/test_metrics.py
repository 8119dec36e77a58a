"""metrics.jsonl: what a kill and a resume leave of it."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from aligndistil.run_folder import MetricsLog, StageFolder


class Seen:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.lines.append((step, split, dict(metrics)))

    def close(self) -> None:
        self.closed = True


def logged(path: Path, steps: int) -> MetricsLog:
    log = MetricsLog(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.log(step, "train", {"loss": 1 / step})
    return log


def test_a_line_is_a_flat_json_object(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "stage" / "metrics.jsonl")
    log.log(1, "train", {"loss": 0.5, "num_tokens": 12})
    log.log(1, "eval", {"loss": 0.6})
    assert log.read() == [
        {"step": 1, "split": "train", "loss": 0.5, "num_tokens": 12.0},
        {"step": 1, "split": "eval", "loss": 0.6},
    ]


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, "train", {"loss": 0.1 + 0.2, "kl": 1e-300})
    assert log.read()[0]["loss"] == 0.1 + 0.2
    assert log.read()[0]["kl"] == 1e-300


def test_what_is_not_finite_is_named_and_not_written(tmp_path: Path) -> None:
    seen = Seen()
    log = MetricsLog(tmp_path / "metrics.jsonl", [seen])
    log.log(3, "train", {"loss": float("nan"), "kl": float("-inf"), "epoch": 1.0})
    assert log.read() == [{"step": 3, "split": "train", "epoch": 1.0, "not_finite": ["loss", "kl"]}]
    assert "NaN" not in log.path.read_text()
    assert seen.lines == [(3, "train", {"epoch": 1.0})]


def test_a_metric_cannot_take_the_place_of_the_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        MetricsLog(tmp_path / "m").log(1, "train", {"step": 2.0})


def test_reading_before_anything_was_logged_gives_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "none" / "metrics.jsonl")
    log.truncate(5)
    assert log.read() == []
    assert not log.path.exists()


def test_a_torn_last_line_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = logged(tmp_path, 2)
    with log.path.open("a") as file:
        file.write('{"step": 3, "spl')
    assert [line["step"] for line in log.read()] == [1, 2]
    log.log(3, "train", {"loss": 0.3})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"st')
    log.log(1, "train", {"loss": 0.3})
    assert [line["step"] for line in log.read()] == [1]


def test_truncating_gives_the_very_file_of_a_run_that_stopped_there(tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    (tmp_path / "short").mkdir()
    long, short = logged(tmp_path / "long", 7), logged(tmp_path / "short", 4)
    with long.path.open("a") as file:
        file.write('{"step": 2')
    long.truncate(4)
    assert long.path.read_bytes() == short.path.read_bytes()


def test_opening_a_resumed_stage_drops_the_steps_it_will_log_again(tmp_path: Path) -> None:
    logged(tmp_path, 7)
    with StageFolder(tmp_path).open_metrics([], start_step=5) as log:
        log.log(6, "train", {"loss": 9.0})
    assert [line["step"] for line in StageFolder(tmp_path).metrics.read()] == [1, 2, 3, 4, 5, 6]


def test_closing_closes_the_trackers(tmp_path: Path) -> None:
    seen = Seen()
    with MetricsLog(tmp_path / "metrics.jsonl", [seen]):
        assert not seen.closed
    assert seen.closed
