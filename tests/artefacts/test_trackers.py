"""TensorBoard, when it is there and when it is not."""

import sys
from pathlib import Path

import pytest

from aligndistil.artefacts import MetricsLog, open_trackers
from aligndistil.errors import MissingError, UserError


def test_tensorboard_gets_each_metric_under_its_split(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "metrics.jsonl", open_trackers(["tensorboard"], tmp_path)) as log:
        log.log(1, "train", {"reward/token_mean": 0.25})
        log.log(2, "eval", {"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/reward/token_mean"]
    assert [(e.step, e.value) for e in events.Scalars("train/reward/token_mean")] == [(1, 0.25)]


def test_tensorboard_forgets_what_a_resumed_run_draws_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps, value in ((0, (1, 2, 3), 0.0), (1, (2,), 1.0)):
        with MetricsLog(tmp_path / f"metrics-{start}", open_trackers(["tensorboard"], tmp_path, start)) as log:
            for step in steps:
                log.log(step, "train", {"loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.0), (2, 1.0)]


def test_without_tensorboard_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingError, match="pip install") as error:
        open_trackers(["tensorboard"], tmp_path)
    assert error.value.exit_code == 3


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'tensorbored' is not a tracker; choose from .*tensorboard"):
        open_trackers(["tensorbored"], tmp_path)


def test_a_tracker_of_another_package_is_called_with_the_stage_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.py").write_text(
        "class Notes:\n"
        "    def __init__(self, folder, start_step):\n        self.file = folder / f'notes-{start_step}'\n"
        "    def log(self, step, split, metrics):\n        self.file.write_text(f'{split} {step} {metrics}')\n"
        "    def close(self):\n        pass\n"
    )
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[aligndistil.trackers]\nnotes = other:Notes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with MetricsLog(tmp_path / "metrics.jsonl", open_trackers(["notes"], tmp_path, 4)) as log:
        log.log(5, "train", {"loss": 0.5})
    assert (tmp_path / "notes-4").read_text() == "train 5 {'loss': 0.5}"
