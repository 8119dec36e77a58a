"""Models of 30,000 random weights, a tokenizer of 96 words, pairs of nonsense, and real processes, as fixtures."""

import atexit
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.models import build_model, build_tokenizer, nonsense

# Before anything reads them: no test touches the network or what a person has cached.
os.environ["HF_HOME"] = home = tempfile.mkdtemp(prefix="aligndistil-tests-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs that ignore SIGINT, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ModelFolder = Callable[..., str]
IN_FLOAT64 = {"golden", "objectives"}
"""Folders of tests that compare to 1e-9 or less."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")


@pytest.fixture(autouse=True)
def double_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Golden numbers and the objectives that are compared with them are float64."""
    if request.path.parent.name not in IN_FLOAT64:
        yield
        return
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Saves a model of `build_model` with its tokenizer; the same arguments give the same folder."""
    known: dict[str, str] = {}

    def folder(**settings: Any) -> str:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            path = tmp_path_factory.mktemp("model")
            build_model(**settings).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
            known[key] = str(path)
        return known[key]

    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[..., str]:
    """Writes n preference pairs of ragged lengths to a .jsonl file."""

    def write(n: int, *, seed: int = 0, name: str = "pairs.jsonl") -> str:
        draw = random.Random(seed)
        rows = [
            {"prompt": nonsense(draw, 1, 6), "chosen": nonsense(draw, 1, 9), "rejected": nonsense(draw, 1, 9)}
            for _ in range(n)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Writes a recipe, and makes its folder the current one."""
    monkeypatch.chdir(tmp_path)

    def write(content: dict[str, Any], name: str = "toy.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Calls `aligndistil ARGUMENT ...` in this process: exit code, stdout and stderr, each without line breaks."""
    from aligndistil.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aligndistil", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), " ".join(captured.err.split())

    return call


@pytest.fixture
def processes() -> Iterator[Any]:
    """This process as a group of one."""
    from aligndistil.engine.processes import start_processes

    started = start_processes()
    yield started
    started.stop()


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


CALL = """
import importlib, json, sys
folder, module, name, arguments, result = sys.argv[1:]
sys.path[:0] = [folder, {tests!r}]
answer = getattr(importlib.import_module(module), name)(*json.loads(arguments))
open(result, "w").write(json.dumps(answer))
"""


@pytest.fixture(scope="session")
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Calls a top-level function of a test module on several processes; its answers (JSON) in order of rank.

    Fails when one of them fails, or when they are not done in time.
    """

    def call(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 120) -> list[Any]:
        file, port = Path(inspect.getfile(function)), free_port()
        results = [tmp_path_factory.mktemp(function.__name__) / f"{rank}.json" for rank in range(world)]
        code = CALL.format(tests=str(Path(__file__).parent))
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(file.parent), file.stem, function.__name__, json.dumps(arguments), r],
                env=environment(rank, world, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, r in enumerate(map(str, results))
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]
        return [json.loads(path.read_text()) for path in results]

    return call


RUNS = """
import json, os, sys, traceback
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
import deepspeed
from aligndistil.errors import UserError
from aligndistil.commands.train import run_recipe
from aligndistil.recipe import load_recipe

def run(order):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(order["folder"])
    try:
        run_recipe(load_recipe(order["recipe"], order["overrides"]))
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(run(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of recipes, each in a process of its own that may be killed, without importing everything for each."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, recipe: Path, *overrides: str) -> int:
        """The id of the process."""
        assert self._server.stdin is not None
        files = {"recipe": str(recipe), "folder": str(recipe.parent), "log": str(recipe.with_suffix(".log"))}
        self._server.stdin.write(json.dumps({**files, "overrides": overrides}) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit code of the process that was started; minus the signal that ended it."""
        return self._answer()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()
