"""The live view of a run: what it says, what it leaves behind, and that it leaves the terminal as it was."""

import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from rich.logging import RichHandler

from aligndistil.progress import RunView, Steps
from aligndistil.progress.view import label

GRAPH = {"dpo": [], "reverse_dpo": [], "aligndistil": ["dpo", "reverse_dpo"]}
PAIRS = ("rewards/margins", "rewards/accuracies", "loss")
TEACHER = ("reward/token_mean", "kl/policy_teacher", "loss")
HEADLINES = {"dpo": PAIRS, "reverse_dpo": PAIRS, "aligndistil": TEACHER}
METRICS = {
    "loss": 0.12345,
    "reward/token_mean": 0.0321,
    "grad_norm": 0.5,
    "kl/policy_teacher": 2.0,
    "perf/tokens_per_second": 1234.0,
}


class Watch:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 80, height: int = 24) -> Console:
    environ = {"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": str(height)}
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, _environ=environ)
    console.is_interactive = True
    return console


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screen(text: str) -> list[str]:
    """The lines a terminal ends up with, down to the cursor's, for the few control sequences that rich writes."""
    lines: list[str] = [""]
    row, column = 0, 0
    for match in re.finditer(r"\x1b\[([0-9;?]*)([a-zA-Z])|(\r)|(\n)|([^\x1b\r\n]+)", text):
        number, command, back, down, plain = match.groups()
        if back:
            column = 0
        elif down:
            row, column = row + 1, 0  # the terminal driver adds the return
            lines += [""] * (row + 1 - len(lines))
        elif plain:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + plain + line[column + len(plain) :]
            column += len(plain)
        elif command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K":
            assert number == "2"
            lines[row] = ""
        else:
            assert command in "mhl", match.group()
    lines = [line.rstrip() for line in lines]
    while len(lines) > row + 1 and not lines[-1]:  # what was erased below the cursor
        lines.pop()
    return lines


def frame(view: RunView, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    return [line.rstrip() for line in written(console).splitlines()]


@contextmanager
def in_training(graph: Mapping[str, Any] = GRAPH, height: int = 24) -> Iterator[RunView]:
    """Two stages are finished, one of them earlier, and the third is at step 47 of 94."""
    watch, console = Watch(), terminal(height=height)
    view = RunView("quickstart", graph, HEADLINES, console=console, clock=watch)
    view.finish("dpo", 94, 31.0, {"loss": 0.4, "rewards/margins": 0.512})
    with view.training("reverse_dpo", 94) as training:
        watch.now += 30
        training.update(94, {"rewards/margins": 0.5})
    watch.now += 5
    with view.training("aligndistil", 94) as training:
        for step in range(1, 48):
            watch.now += 1
            training.update(step, METRICS | {"reward/token_mean": step / 1000})
        yield view


def test_the_view_says_everything_in_eighty_columns() -> None:
    with in_training() as view:
        lines = frame(view)
    assert lines[0] == "quickstart  2 of 3 stages finished, 1:22"
    assert re.fullmatch(r"✓ dpo \(earlier\) +━+ 94/94 +0:31 +rewards/margins 0\.512", lines[1])
    assert re.fullmatch(r"✓ reverse_dpo +━+ 94/94 +0:30 +rewards/margins 0\.5", lines[2])
    assert re.fullmatch(r"▶ aligndistil ← dpo, reverse_dpo ━+[╸╺]?━* +47/94 0:47 left", lines[3])
    assert re.fullmatch(r"reward/token_mean 0\.047 ▁+[▂▃▄▅▆▇]+█+", lines[4])
    assert lines[5] == "1,234 tok/s, kl/policy_teacher 2, loss 0.1235"
    assert len(lines) == 6
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [20, 40, 50, 60, 80, 120, 200])
def test_the_view_fits_any_width(width: int) -> None:
    with in_training() as view:
        lines = frame(view, width)
    assert max(map(len, lines)) <= min(width, 120)
    assert len(lines) == 6


@pytest.mark.parametrize("width", [40, 50, 60])
def test_a_narrow_terminal_keeps_whole_words_the_bar_and_the_name_of_the_metric(width: int) -> None:
    with in_training() as view:
        lines = frame(view, width)
    assert not any("…" in line for line in lines)
    assert re.fullmatch(r"▶ aligndistil +━+[╸╺]?━* +47/94 0:47 left", lines[3])
    assert re.fullmatch(r"reward/token_mean 0\.047 ▁+[▂▃▄▅▆▇]+█+", lines[4])
    assert lines[5].startswith("1,234 tok/s, kl/policy_teacher 2")


def test_where_figures_are_long_the_bar_gives_way() -> None:
    watch = Watch()
    view = RunView("run", {"aligndistil": []}, console=terminal(), clock=watch)
    with view.training("aligndistil", 100_000) as training:
        watch.now += 36_000
        training.update(50_000, {"loss": 1.0})
        lines = frame(view, 40)
    assert re.fullmatch(r"▶ aligndistil +50000/100000 10:00:00 left", lines[1])


def test_stages_that_wait_show_what_they_wait_for() -> None:
    with in_training({**GRAPH, "more": ["aligndistil"], "other": []}) as view:
        lines = frame(view)
    assert re.fullmatch("○ more ← aligndistil[ ━]*", lines[4])
    assert re.fullmatch("○ other[ ━]*", lines[5])


def test_fifteen_stages_fit_on_a_terminal_of_24_lines() -> None:
    graph: dict[str, list[str]] = {**GRAPH, **{f"variant_{i}": ["dpo"] for i in range(12)}}
    with in_training(graph) as view:
        lines = frame(view, 40)
    assert len(lines) == 1 + 15 + 2


def test_many_stages_are_counted_where_there_is_no_room_for_them() -> None:
    graph: dict[str, list[str]] = {**GRAPH, **{f"variant_{i}": ["dpo"] for i in range(30)}}
    with in_training(graph) as view:
        lines = frame(view, height=20)
    assert len(lines) == 19
    assert lines[0] == "quickstart  2 of 33 stages finished, 1:22, 17 not shown"
    assert [line.split()[1] for line in lines[1:17]] == ["aligndistil", *(f"variant_{i}" for i in range(15))]
    assert len(frame(view, height=20)) == 34  # the summary has them all


@pytest.mark.parametrize(
    ("metrics", "drawn", "beside"),
    [
        ({"loss": 1.0, "gold_reward": 2.0, "reward/token_mean": 3.0}, "reward/token_mean 3 ▄", "gold_reward 2"),
        ({"loss": 1.0, "gold_reward": 2.0}, "gold_reward 2 ▄", ""),
        ({"loss": 1.0}, "the first step is on its way", ""),
    ],
)
def test_the_first_metric_of_the_headline_that_steps_have_is_drawn(
    metrics: dict[str, float], drawn: str, beside: str
) -> None:
    view = RunView("run", {"on": []}, {"on": ("reward/token_mean", "gold_reward")}, console=terminal())
    with view.training("on", 2) as training:
        assert frame(view)[2] == "the first step is on its way"
        training.update(1, metrics)
        assert frame(view)[2:] == [drawn, beside]


def test_a_stage_without_a_headline_shows_its_loss() -> None:
    view = RunView("run", {"dpo": []}, console=terminal())
    with view.training("dpo", 2) as training:
        training.update(1, {"loss": 1.0, "rewards/margins": 2.0})
        assert frame(view)[2:] == ["loss 1 ▄", ""]


def test_a_resumed_stage_has_the_course_of_its_whole_training_and_the_time_of_this_one() -> None:
    watch = Watch()
    view = RunView("run", {"dpo": []}, console=terminal(), clock=watch)
    history = [{"step": step, "split": "train", "loss": 5.0 - step} for step in (1, 2, 3)]
    history += [{"step": 2, "split": "eval", "loss": 99.0}, {"step": 4, "split": "train", "loss": 99.0}]
    with view.training("dpo", 10, 3, history) as training:
        watch.now += 2
        training.update(4, {"loss": 1.0})
        lines = frame(view)
    assert lines[1].endswith("4/10 0:12 left")
    assert lines[2] == "loss 1 █▆▃▁"


def test_training_leaves_only_the_stages_behind() -> None:
    console, watch = terminal(), Watch()
    with RunView("quickstart", GRAPH, console=console, clock=watch) as view:
        for stage in GRAPH:
            with view.training(stage, 2) as training:
                for step in (1, 2):
                    watch.now += 1
                    training.update(step, {"loss": 1 / step})
            view.finish(stage, 2, 2.0, {"loss": 0.5})
    lines = screen(written(console))
    assert lines[0] == "quickstart  3 of 3 stages finished, 0:06"
    assert [line.split()[:2] for line in lines[1:]] == [*(["✓", stage] for stage in GRAPH), []]
    assert all(re.search(r"━ 2/2 0:02 loss 0\.5$", line) for line in lines[1:-1])


def test_nothing_is_left_when_every_stage_was_finished_before() -> None:
    console = terminal()
    with RunView("quickstart", GRAPH, console=console) as view:
        for stage in GRAPH:
            view.finish(stage, 94, 30.0, {})
    assert written(console) == ""


def test_an_error_leaves_the_stage_marked_as_stopped() -> None:
    console = terminal()

    def interrupted() -> None:
        with RunView("quickstart", GRAPH, console=console) as view:
            view.finish("dpo", 94, 30.0, {})
            with view.training("reverse_dpo", 94) as training:
                training.update(12, {"loss": 0.5})
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    lines = screen(written(console))
    assert re.fullmatch(r"■ reverse_dpo +[━╸╺]+ +12/94 +loss 0\.5", lines[2])
    assert re.fullmatch("○ aligndistil ← dpo, reverse_dpo[ ━]*", lines[3])
    assert written(console).endswith("\n")
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("metric", "word"),
    [
        ("loss", "loss"),
        ("gold_reward", "gold_reward"),
        ("reward/token_mean", "reward"),
        ("rewards/margins", "margin"),
        ("rewards/accuracies", "accuracy"),
        ("objective/scores", "score"),
        ("scores/mean", "score"),
        ("kl/policy_teacher", "kl"),
        ("a/cross_loss", "cross_loss"),
    ],
)
def test_a_plain_line_calls_a_metric_by_a_short_word(metric: str, word: str) -> None:
    assert label(metric) == word


def test_a_plain_line_shows_the_loss_then_the_headline_and_nothing_that_a_step_does_not_have() -> None:
    console, watch = Console(file=io.StringIO(), width=80), Watch()
    step = {"rewards/margins": -0.01324, "loss": 0.7012, "grad_norm": 1.0, "perf/tokens_per_second": 1809.4}
    view = RunView("run", {"a[b]": []}, {"a[b]": PAIRS}, console=console, clock=watch)
    with view.training("a[b]", 94, 17) as training:
        watch.now += 20
        training.update(18, step)
        training.update(19, {"loss": 0.7})  # less than 15 seconds later
        watch.now += 15
        training.update(20, {"loss": 0.6})
    assert written(console).splitlines() == [
        "a[b]: 18/94, left 25:20, loss 0.701, margin -0.0132, tok/s 1,809, elapsed 0:20",
        "a[b]: 20/94, left 14:23, loss 0.6, elapsed 0:35",
    ]


def test_a_stage_may_have_brackets_in_its_name() -> None:
    view = RunView("a[/b]", {"a[/b]": [], "c": ["a[/b]"]}, console=terminal())
    with view.training("a[/b]", 2):
        lines = frame(view)
    assert lines[0].startswith("a[/b]  0 of 2")
    assert lines[1].startswith("▶ a[/b] ")
    assert lines[2].startswith("○ c ← a[/b]")


def test_log_messages_and_prints_appear_above_the_view() -> None:
    console = terminal()
    logger = logging.getLogger("test_run_view")
    logger.propagate = False
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logger.addHandler(handler)
    try:
        with RunView("run", {"dpo": []}, console=console) as view, view.training("dpo", 3) as progress:
            progress.update(1, {"loss": 0.5})
            logger.warning("a response was cut")
            print("from a library")  # stdout and stderr are rich's while the view is drawn
            sys.stderr.write("and its stderr\n")
            progress.update(2, {"loss": 0.4})
            time.sleep(1.2)  # at least one refresh
            before = screen(written(console))
            progress.update(3, {"loss": 0.3})
    finally:
        logger.removeHandler(handler)
    assert [line.split("  ")[0] for line in before[:4]] == [
        "WARNING",
        "from a library",
        "and its stderr",
        "run",
    ]
    assert "a response was cut" in before[0]
    assert sum("2/3" in line for line in before) == 1
    after = screen(written(console))
    assert after[:3] == before[:3]
    assert [line.split("━")[0].split("  ")[0].rstrip() for line in after[3:]] == ["run", "✓ dpo", ""]


def test_a_bar_inside_the_view_does_not_break_it() -> None:
    console = terminal()
    with RunView("run", {"dpo": []}, console=console) as view, view.training("dpo", 2) as progress:
        progress.update(1, {"loss": 0.5})
        with Steps("sampling", 2, console=console) as steps:
            steps.advance(2)
        progress.update(2, {"loss": 0.4})
    lines = screen(written(console))
    assert lines[0].startswith("sampling")
    assert [line.split("━")[0].split("  ")[0].rstrip() for line in lines[1:]] == ["run", "✓ dpo", ""]


@pytest.mark.parametrize("where", ["a file", "another rank"])
def test_nothing_is_drawn_in_a_file_or_on_another_rank(where: str) -> None:
    console = terminal() if where == "another rank" else Console(file=io.StringIO(), width=80)
    rank = int(where == "another rank")
    with RunView("quickstart", GRAPH, console=console, rank=rank) as view:
        with view.training("dpo", 2) as progress:
            progress.update(2, {"loss": 0.5})
        view.finish("dpo", 2, 1.0, {"loss": 0.5})
    assert written(console) == ("" if rank else "dpo: 2/2, loss 0.5, elapsed 0:00\n")


def test_the_view_costs_next_to_nothing() -> None:
    view = RunView("run", GRAPH, HEADLINES, console=terminal(), clock=Watch())
    with view.training("aligndistil", 5000) as training:
        began = time.perf_counter()
        for step in range(1, 2001):
            training.update(step, METRICS)
        each_step = (time.perf_counter() - began) / 2000
        assert each_step < 1e-3
        began = time.perf_counter()
        for _ in range(10):
            frame(view)
        assert (time.perf_counter() - began) / 10 < 0.1  # two of these a second, in another thread


PROGRAM = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a typed Ctrl-C is a signal
from aligndistil.progress import RunView

graph = {"dpo": [], "aligndistil": ["dpo"]}
headlines = {"dpo": ["rewards/margins"], "aligndistil": ["reward/token_mean"]}
with RunView("quickstart", graph, headlines) as view:
    view.finish("dpo", 94, 30.0, {"rewards/margins": 0.5})
    with view.training("aligndistil", 1000) as training:
        for step in range(1, 1001):
            training.update(step, {"reward/token_mean": step / 1000, "perf/tokens_per_second": 100.0})
            time.sleep(0.05)
"""


class Terminal:
    """A program on a pseudo-terminal of 80 x 24."""

    def __init__(self, program: str, **more: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(80)
        plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
        environment = plain | {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), **more}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def resize(self, width: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def read_until(self, wanted: str, seconds: float = 60) -> None:
        """Raises AssertionError when it is not written in time."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, self.text
            if not self.read_some():
                break
        assert wanted in self.text

    def read_some(self) -> bool:
        if not select.select([self.ours], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # the program has ended
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def end(self) -> int:
        while self.read_some() and self.process.poll() is None:
            pass
        while self.read_some() and select.select([self.ours], [], [], 0.2)[0]:
            pass
        os.close(self.ours)
        return self.process.wait(60)


def test_on_a_real_terminal_the_stages_are_drawn_and_ctrl_c_gives_the_cursor_back() -> None:
    terminal = Terminal(PROGRAM)
    terminal.read_until("reward/token_mean")
    terminal.read_until("tok/s")
    assert "\x1b[?25l" in terminal.text
    lines = screen(terminal.text)
    assert any(re.fullmatch(r"✓ dpo \(earlier\) +━+ 94/94 +0:30 +rewards/margins 0\.5", line) for line in lines)
    assert any(re.fullmatch(r"▶ aligndistil ← dpo +[━╸╺]+ +\d+/1000 \d+:\d\d left", line) for line in lines)
    terminal.type(b"\x03")
    assert terminal.end() != 0
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
    lines = screen(terminal.text)
    assert any(line.startswith("quickstart  1 of 2 stages finished") for line in lines)
    assert any(re.fullmatch(r"■ aligndistil ← dpo +[━╸╺]+ +\d+/1000 +reward/token_mean 0\.\d+", line) for line in lines)
    assert not any("tok/s" in line for line in lines)
    assert lines[-2:] == ["KeyboardInterrupt", ""]


def test_the_view_follows_the_width_of_the_terminal() -> None:
    terminal = Terminal(PROGRAM)
    terminal.read_until("tok/s")
    terminal.resize(50)
    terminal.text = ""
    terminal.read_until("tok/s")  # perhaps of a frame that was drawn before
    terminal.text = ""
    terminal.read_until("tok/s")
    terminal.read_until("\r\n")
    terminal.type(b"\x03")
    terminal.end()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
    bars = [line for line in drawn.replace("\r", "\n").splitlines() if "left" in line]
    assert bars
    assert {len(line.rstrip()) for line in bars} == {50}


def test_on_a_real_terminal_no_color_means_plain_lines() -> None:
    short = PROGRAM.replace("range(1, 1001)", "range(991, 1001)")
    terminal = Terminal(short, NO_COLOR="1")
    terminal.read_until("1000/1000")
    assert terminal.end() == 0
    assert "\x1b" not in terminal.text
    assert [line.split(",")[0] for line in terminal.text.splitlines()] == [
        "aligndistil: 991/1000",
        "aligndistil: 1000/1000",
    ]
