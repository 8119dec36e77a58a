"""Weights & Biases, trackio and MLflow, offline or local: what was logged is read back from their files."""

import json
import os
import pty
import select
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ATTEMPT = """
import logging, sys
from pathlib import Path
from aligndistil.run_folder import MetricsLog, open_trackers

logging.basicConfig(format="%(levelname)s: %(message)s")
logging.getLogger("aligndistil").setLevel(logging.INFO)
name, start = sys.argv[1], int(sys.argv[2])
folder = Path("runs/quick/dpo")
with MetricsLog(folder / "metrics.jsonl", open_trackers([name], folder, start)) as log:
    for step in (start + 1, start + 2):
        log.log(step, "train", {"loss": 1 / step, "reward/token_mean": step / 8})
    log.log(start + 2, "eval", {"loss": 4.0})
    if start == 0:
        raise KeyboardInterrupt
"""
"""Two steps of training and an evaluation; the first attempt is then interrupted."""

Value = tuple[int, str, float]
"""Step, name, value."""


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "quick" / "dpo"
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text("name: dpo\nobjective: {name: dpo, beta: 0.1}\n")
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """Nobody's credentials and settings, and data under `home`."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_", "MLFLOW_"))}
    ours |= {"HOME": str(home), "TRACKIO_DIR": str(home / "trackio"), "HF_HUB_OFFLINE": "1"}
    return ours | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


def attempt(name: str, start: int, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ATTEMPT, name, str(start)]
    return subprocess.run(
        command, cwd=home, env=environment(home, **more), capture_output=True, text=True, timeout=180, check=False
    )


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: a log in 32 KiB blocks of (crc, length, kind) and a piece of a record."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(stage: Path) -> tuple[set[str], set[str], list[Value], str]:
    from wandb.proto.wandb_internal_pb2 import Record

    ids, names, values, config = set(), set(), [], {}
    for file in sorted(stage.glob("wandb/offline-run-*/*.wandb")):
        for raw in wandb_records(file):
            record = Record.FromString(raw)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                names.add(record.run.display_name)
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            values += [(items["_step"], k, v) for k, v in items.items() if not k.startswith("_")]
    return ids, names, values, str(config["objective"]["beta"])


def read_trackio(stage: Path) -> tuple[set[str], set[str], list[Value], str]:
    home = stage.parents[2]
    with sqlite3.connect(home / "trackio" / "aligndistil.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        config = json.loads(database.execute("SELECT config FROM configs").fetchone()[0])
    values = [(step, key, value) for *_, step, metrics in rows for key, value in json.loads(metrics).items()]
    return {row[0] for row in rows}, {row[1] for row in rows}, values, str(config["objective"]["beta"])


def read_mlflow(stage: Path) -> tuple[set[str], set[str], list[Value], str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{stage.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("aligndistil")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    values = [(m.step, m.key, m.value) for history in histories for m in history]
    return {run.info.run_id}, {run.info.run_name}, values, run.data.params["objective.beta"]


@pytest.mark.parametrize(("name", "read"), [("wandb", read_wandb), ("trackio", read_trackio), ("mlflow", read_mlflow)])
def test_an_interrupted_and_resumed_stage_is_one_run_with_every_value(
    name: str, read: Callable[[Path], tuple[set[str], set[str], list[Value], str]], stage: Path
) -> None:
    for package in {"mlflow": ("mlflow", "sqlalchemy", "alembic")}.get(name, (name,)):
        pytest.importorskip(package)
    home = stage.parents[2]
    first = attempt(name, 0, home)
    assert first.stderr.strip().endswith("KeyboardInterrupt"), first.stderr
    second = attempt(name, 2, home)
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    ids, names, values, beta = read(stage)
    assert len(ids) == 1
    assert names == {"quick/dpo"}
    expected = [(step, "train/loss", 1 / step) for step in (1, 2, 3, 4)]
    expected += [(step, "train/reward/token_mean", step / 8) for step in (1, 2, 3, 4)]
    expected += [(2, "eval/loss", 4.0), (4, "eval/loss", 4.0)]
    assert sorted(values) == sorted(expected)
    assert beta == "0.1"


def test_wandb_without_a_login_stays_offline_and_says_so_in_one_line(stage: Path) -> None:
    pytest.importorskip("wandb")
    done = attempt("wandb", 2, stage.parents[2])
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "INFO: wandb: this machine is not logged in (`wandb login`, WANDB_API_KEY), so the run stays"
    )
    (folder,) = stage.glob("wandb/offline-run-*")
    assert f"`wandb sync {folder.relative_to(stage.parents[2])}`" in line


def test_wandb_takes_neither_code_nor_the_console(stage: Path) -> None:
    pytest.importorskip("wandb")
    attempt("wandb", 2, stage.parents[2])
    taken = {path.name for path in stage.glob("wandb/offline-run-*/files/**/*") if path.is_file()}
    assert taken <= {"requirements.txt", "wandb-metadata.json", "config.yaml", "wandb-summary.json"}


def test_wandb_asks_nothing_on_a_terminal(stage: Path) -> None:
    pytest.importorskip("wandb")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ATTEMPT, "wandb", "2"]
    home = stage.parents[2]
    with subprocess.Popen(
        command, cwd=home, env=environment(home, TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 60)[0]:
                try:
                    shown += os.read(ours, 4096)
                except OSError:  # the other side is closed
                    break
            else:
                process.kill()
    os.close(ours)
    assert process.returncode == 0, shown
    assert shown.count(b"\n") == 1, shown


def test_wandb_goes_offline_when_its_server_does_not_answer(stage: Path) -> None:
    pytest.importorskip("wandb")
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    done = attempt("wandb", 2, stage.parents[2], **server)
    assert done.returncode == 0, done.stderr
    assert "so the run stays offline" in done.stderr
    assert {value for _, name, value in read_wandb(stage)[2] if name == "train/loss"} == {1 / 3, 1 / 4}


def test_an_mlflow_server_that_does_not_answer_stops_nothing(stage: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = attempt("mlflow", 2, stage.parents[2], **server)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training goes on") == 1
    assert "mlflow: it never got 3 lines of metrics.jsonl" in done.stderr
    assert len((stage / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (stage.parent / "mlflow.db").exists()


def test_mlflow_uses_the_store_it_is_told_to(stage: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'theirs.db'}"
    attempt("mlflow", 2, stage.parents[2], MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME="reviews")
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("reviews")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["train/loss"] == pytest.approx(1 / 4)
    assert not (stage.parent / "mlflow.db").exists()
