"""Trackers by name, TensorBoard, and what happens when a tracker is missing or fails."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands.train import check_recipe
from aligndistil.errors import MissingError, UserError
from aligndistil.recipe import Recipe, load_recipe, recipe_schema
from aligndistil.run_folder import MetricsLog, open_trackers
from aligndistil.run_folder.trackers import TRACKERS, check_trackers
from aligndistil.run_folder.trackers.guard import AGAIN_AFTER, Guarded
from aligndistil.run_folder.trackers.mlflow_tracker import flat


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


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_refused_with_the_extra_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in TRACKERS[name].needs:
        monkeypatch.setitem(sys.modules, module, None)
    for refuse in (lambda: check_trackers([name]), lambda: open_trackers([name], tmp_path)):
        with pytest.raises(MissingError, match=rf"`pip install aligndistil\[{name}\]`") as error:
            refuse()
        assert error.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_like_a_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MissingError, match="wandb is not installed"):
        check_trackers(["wandb"])


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    named = "The trackers are `tensorboard`, `wandb`, `trackio`"
    with pytest.raises(UserError, match=f"`tensorbored` is not a tracker; did you mean `tensorboard`[?] {named}"):
        open_trackers(["tensorbored"], tmp_path)
    with pytest.raises(UserError, match=r"`stdout` is not a tracker; the trackers are `tensorboard`, `wandb`"):
        open_trackers(["stdout"], tmp_path)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, installed, with a tracker called notes."""
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


def written_with(trackers: Any, recipe_file: Callable[[dict[str, Any]], Path]) -> Recipe:
    content = {
        "model": {"path": "builtin:tiny"},
        "models": {"reference": "builtin:tiny"},
        "data": {"train": {"path": "builtin:reviews"}},
        "stages": {"s": {"objective": {"name": "dpo"}}},
        "logging": {"trackers": trackers},
    }
    return load_recipe(recipe_file(content))


@pytest.mark.usefixtures("notes")
def test_a_recipe_may_name_a_tracker_of_another_package(recipe_file: Callable[[dict[str, Any]], Path]) -> None:
    recipe = written_with(["notes"], recipe_file)
    check_recipe(recipe, 1)
    assert recipe.stages["s"].logging.trackers == ["notes"]
    said = r"`nots` is not a tracker; did you mean `notes`\? .* `mlflow` and `notes`"
    with pytest.raises(UserError, match=said) as error:
        check_recipe(written_with(["nots"], recipe_file), 1)
    assert error.value.exit_code == 2


def test_a_recipe_that_names_a_tracker_which_is_not_installed_is_refused(
    recipe_file: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"`notes` is not a tracker; the trackers are"):
        check_recipe(written_with(["notes"], recipe_file), 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError, match=r"`pip install aligndistil\[wandb\]`"):
        check_recipe(written_with(["wandb"], recipe_file), 1)
    with pytest.raises(UserError, match=r"logging\.trackers\.0: must be a string, not 3: put it in quotes"):
        written_with([3], recipe_file)


def test_editors_offer_our_trackers_and_accept_others() -> None:
    (names, _) = recipe_schema()["$defs"]["Logging"]["properties"]["trackers"]["anyOf"]
    assert names["items"] == {"type": "string", "minLength": 1, "examples": list(TRACKERS)}


@pytest.mark.usefixtures("notes")
def test_a_tracker_of_another_package_is_called_with_the_stage_folder(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", open_trackers(["notes"], tmp_path, 4)) as log:
        log.log(5, "train", {"loss": 0.5})
    assert (tmp_path / "notes-4").read_text() == "train 5 {'loss': 0.5}"


class Server:
    """A tracker whose server can be away."""

    def __init__(self) -> None:
        self.away = False
        self.opened = 0
        self.got: list[tuple[int, str, Mapping[str, float]]] = []

    def open(self) -> "Server":
        self._ask()
        self.opened += 1
        return self

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._ask()
        self.got.append((step, split, metrics))

    def close(self) -> None:
        self._ask()

    def _ask(self) -> None:
        if self.away:
            raise ConnectionError("the server does not answer")


def test_a_server_that_is_away_gets_every_line_later_and_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    server, now = Server(), [0.0]
    server.away = True
    guarded = Guarded("mlflow", server.open, clock=lambda: now[0])
    guarded.log(1, "train", {"loss": 3.0})
    guarded.log(2, "train", {"loss": 2.0})
    server.away = False
    guarded.log(3, "train", {"loss": 1.0})
    assert server.got == []  # it is not asked again at once: each attempt may take seconds of training
    now[0] = AGAIN_AFTER
    guarded.log(4, "train", {"loss": 0.0})
    assert [(step, metrics["loss"]) for step, _, metrics in server.got] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.0)]
    server.away = True
    guarded.log(5, "eval", {"loss": 9.0})
    server.away = False
    guarded.close()
    assert server.got[-1] == (5, "eval", {"loss": 9.0})
    assert server.opened == 1
    messages = [record.message for record in caplog.records]
    assert messages == [
        "mlflow: the server does not answer; training goes on, and metrics.jsonl has every value",
    ]


def test_a_server_that_never_comes_back_is_counted_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    guarded = Guarded("mlflow", server.open)
    server.away = True
    for step in range(3):
        guarded.log(step, "train", {"loss": 1.0})
    guarded.close()
    assert caplog.records[-1].message == "mlflow: it never got 3 lines of metrics.jsonl"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_bug_in_a_tracker_is_not_hidden() -> None:
    class Broken(Server):
        def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        Guarded("broken", Broken).log(1, "train", {"loss": 1.0})


def test_a_recipe_is_flat_for_mlflow() -> None:
    nested = {"objective": {"name": "dpo", "beta": 0.1}, "data": {"train": [{"path": "x"}]}, "models": {}, "eval": None}
    assert flat(nested) == {
        "objective.name": "dpo",
        "objective.beta": "0.1",
        "data.train": '[{"path": "x"}]',
        "models": "{}",
        "eval": "null",
    }
    assert flat({"template": "x" * 600}) == {"template": "x" * 500}
