"""One task on many items in several processes, the answers in the order of the items.

A worker is a new interpreter that reads its task and items from a pipe. Nothing is forked, so threads (a tokenizer's),
devices and process groups of this process do no harm, and the program that runs is not imported again. A worker ends
when its pipe does, however this process ends; a Ctrl-C on the terminal is for this process alone.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any, TypeVar

from aligndistil.errors import UserError

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from aligndistil.data.workers import serve; serve()"


def in_processes(
    task: Callable[[_Item], _Answer], items: Iterable[_Item], workers: int
) -> Generator[_Answer, None, None]:
    """`map(task, items)` in `workers` processes; few items and answers wait at a time.

    The task, what it is given and what it returns are pickled. Close the generator to end the processes. Raises what
    the task raises, and UserError when a worker ends before its time.
    """
    pickled = pickle.dumps(task)
    with ExitStack() as stack:
        # Last in, first out: the processes end first, so that no thread waits for one.
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        idle = SimpleQueue[_Worker]()
        for _ in range(workers):
            worker = _Worker(pickled)
            stack.callback(worker.stop)
            idle.put(worker)

        def answered(item: _Item) -> _Answer:
            worker = idle.get()
            try:
                answer: _Answer = worker.ask(item)
                return answer
            finally:
                idle.put(worker)

        waiting: deque[Future[_Answer]] = deque()
        stack.callback(lambda: [future.cancel() for future in waiting])
        for item in items:
            waiting.append(threads.submit(answered, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker:
    """A process that does the task."""

    def __init__(self, task: bytes) -> None:
        self._task: bytes | None = task
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        # Its part of the cores is one: it must not start as many threads as there are cores.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([str(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )

    def ask(self, item: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._task is not None:
                self._process.stdin.write(self._task)
                self._task = None
            pickle.dump(item, self._process.stdin)
            self._process.stdin.flush()
            done, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        if not done:
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # what was not flushed is of no use to anyone
                continue
        self._log.close()

    def _ended(self) -> Exception:
        code = self._process.wait()
        if code < 0:
            return UserError(
                f"a process that prepares the data was ended by signal {-code}, as when memory runs out; lower "
                "data.workers"
            )
        self._log.seek(0)
        return RuntimeError(f"a process that prepares the data ended: {self._log.read().decode(errors='replace')}")


def serve() -> None:
    """The life of a worker: a task, then items, from standard input; what it prints goes to standard error."""
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()  # a tokenizer may have code of its own
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    task = pickle.load(sys.stdin.buffer)
    while True:
        try:
            item = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, task(item)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = False, error
        pickle.dump(answer, answers)
        answers.flush()
