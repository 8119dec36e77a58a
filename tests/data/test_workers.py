"""Work in several processes: the same answers in the same order, and an end that comes when it is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.batch import DataKind
from aligndistil.data import encoded_source as module
from aligndistil.data import load_examples
from aligndistil.data.cache import ARRAYS
from aligndistil.data.workers import in_processes
from aligndistil.errors import UserError
from aligndistil.recipe import Data

Write = Callable[..., str]
HERE = str(Path(__file__).parent)


class Task:
    """What a worker does with a number."""

    def __init__(self, what: str = "square") -> None:
        self.what = what

    def __call__(self, number: int) -> Any:
        if self.what == "die" and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "exit" and number == 3:
            print("the reason", file=sys.stderr, flush=True)
            os._exit(7)
        if self.what == "refuse" and number == 3:
            raise UserError("row 3 is wrong")
        if self.what == "break" and number == 3:
            raise ZeroDivisionError("three")
        if self.what == "print":
            print("said aloud", flush=True)
        time.sleep(0.05 * (number == 0))
        return number * number, os.getpid()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module, by the name that its classes are pickled under."""
    monkeypatch.syspath_prepend(HERE)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_other_processes_answer_in_the_order_of_the_items_whatever_they_print_and_are_gone_afterwards() -> None:
    answers = list(in_processes(Task("print"), range(9), 2))
    assert [square for square, _ in answers] == [number * number for number in range(9)]
    pids = {pid for _, pid in answers}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    assert not any(map(alive, pids))


def test_few_items_are_taken_ahead_of_the_answers() -> None:
    taken: list[int] = []

    def items() -> Any:
        for number in range(50):
            taken.append(number)
            yield number

    answers = in_processes(Task(), items(), 2)
    next(answers)
    assert len(taken) <= 4
    answers.close()


@pytest.mark.parametrize(
    ("what", "kind", "told"),
    [
        ("refuse", UserError, "row 3 is wrong"),
        ("break", ZeroDivisionError, "three"),
        ("die", UserError, r"ended by signal 9.*lower data\.workers"),
        ("exit", RuntimeError, "the reason"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(what: str, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told) as raised:
        list(in_processes(Task(what), range(8), 2))
    if what == "break":
        assert "in __call__" in raised.value.__notes__[0]  # where it went wrong


def pairs(count: int) -> list[dict[str, Any]]:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Not {i}."} for i in range(count)]
    return [{**row, "chosen": ""} if i % 50 == 7 else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", [DataKind.PAIRS, DataKind.UNPAIRED])
def test_no_bit_depends_on_the_number_of_workers(
    llama: Any, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: DataKind
) -> None:
    monkeypatch.setattr(module, "ROWS_OF_A_PIECE", 40)
    monkeypatch.setattr(module, "BYTES_OF_A_WORKER", 1000)
    started: list[int] = []
    monkeypatch.setattr(module, "in_processes", lambda *given: started.append(given[2]) or in_processes(*given))
    path = write(pairs(210))

    def encoded(workers: int) -> tuple[Any, ...]:
        monkeypatch.setenv("HF_HOME", str(tmp_path / f"{workers}"))
        told: list[tuple[int, int]] = []
        section = Data.model_validate({"train": {"path": path}, "workers": workers, "max_prompt_length": 11})
        examples = load_examples(
            section, "train", kind, llama, frozenset(), on_progress=lambda *progress: told.append(progress)
        )
        (part,) = examples._parts
        arrays = [getattr(part.encoded, name).tobytes() for name in ARRAYS]
        return arrays, examples.report, told

    alone = encoded(1)
    assert alone[2] == [(done, 210) for done in (40, 80, 120, 160, 200, 210)]
    assert alone[1].dropped["empty response"].rows == [8, 58, 108, 158, 208]
    for workers in (2, 3):
        assert encoded(workers) == alone
    assert started == [2, 3]


@pytest.mark.parametrize(
    ("rows", "asked", "cores", "started"),
    [(10, None, 8, 1), (100, None, 8, 4), (100, 2, 8, 2), (100, 16, 8, 4), (1000, None, 8, 8), (1000, 1, 8, 1)],
)
def test_as_many_are_started_as_are_worth_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, rows: int, asked: int | None, cores: int, started: int
) -> None:
    monkeypatch.setattr(module, "BYTES_OF_A_ROW", 1000)
    monkeypatch.setattr(module, "BYTES_OF_A_WORKER", 60_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    raw = module.load_rows(Data.model_validate({"train": {"path": write([{"prompt": "x" * 1000}] * rows)}}).train[0])
    assert module._worth_starting(raw, asked) == started


SLOW = """
import sys
sys.path.insert(0, {here!r})
from test_workers import Slow
from aligndistil.data.workers import in_processes
from aligndistil.engine.processes import start_processes

start_processes()
for answer in in_processes(Slow(), range(1000), 2):
    print(answer, flush=True)
"""


class Slow:
    """Items that take as long as those of a large source."""

    def __call__(self, number: int) -> int:
        time.sleep(0.3)
        return os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all_of_them_within_seconds_beside_a_process_group(number: signal.Signals) -> None:
    script = SLOW.format(here=HERE)
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    pids = {int(started.stdout.readline()) for _ in range(4)}
    assert len(pids) == 2
    began = time.monotonic()
    started.send_signal(number)
    assert started.wait(20) == -number
    while any(map(alive, pids)):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    started.communicate()
