"""Progress on a terminal, in a file, and on the other ranks."""

import io
import re

import pytest
from rich.console import Console

from aligndistil.progress import Steps, TrainingProgress, duration, track


class Watch:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def file_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal_console(width: int = 80, **environment: str) -> Console:
    environ = {"TERM": "xterm-256color", "COLUMNS": str(width), **environment}
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True, _environ=environ)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_durations_read_as_a_clock_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_outside_a_terminal_there_is_a_line_every_fifteen_seconds_and_one_at_the_end() -> None:
    console, watch = file_console(), Watch()
    with TrainingProgress("dpo", 100, console=console, clock=watch) as progress:
        for step in range(1, 101):
            watch.now += 0.5
            progress.update(step, {"loss": 0.5})
    lines = shown(console).splitlines()
    # 50 seconds: at 0.5, 15.5, 30.5, 45.5, and the last step.
    assert [line.split(" ")[1] for line in lines] == ["1/100,", "31/100,", "61/100,", "91/100,", "100/100,"]
    assert lines[1] == "dpo: 31/100, left 0:34, loss 0.5, elapsed 0:16"
    assert lines[-1].endswith(", elapsed 0:50")


def test_a_line_shows_what_the_step_has_and_nothing_else() -> None:
    console, watch = file_console(), Watch()
    with TrainingProgress("a[b]", 1, console=console, clock=watch) as progress:
        progress.update(1, {"reward/token_mean": 0.04321, "perf/tokens_per_second": 12345.6, "grad_norm": 1.0})
    assert shown(console) == "a[b]: 1/1, reward 0.0432, tok/s 12,346, elapsed 0:00\n"


def test_time_left_counts_only_the_steps_of_this_run() -> None:
    console, watch = file_console(), Watch()
    with TrainingProgress("dpo", 100, start=90, console=console, clock=watch) as progress:
        watch.now += 10
        progress.update(91, {})
    assert shown(console) == "dpo: 91/100, left 1:30, elapsed 0:10\n"


def test_other_ranks_say_nothing() -> None:
    for console in (file_console(), terminal_console()):
        with TrainingProgress("dpo", 2, rank=1, console=console) as progress:
            progress.update(1, {"loss": 0.5})
        assert shown(console) == ""


def test_a_terminal_shows_a_bar_and_everything_else_in_eighty_columns() -> None:
    console, watch = terminal_console(), Watch()
    with Steps("comparing models", 500, unit="models", console=console, clock=watch) as steps:
        watch.now += 240
        steps.advance(120, {"now": "aligndistil"})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(console))
    last = text.splitlines()[-1]
    assert last.startswith("comparing models ╸━━━ 0:00:00 ")
    assert "120/500 models left 12:40 now aligndistil" in last
    assert len(last) <= 80


def test_a_stage_may_have_brackets_in_its_name() -> None:
    console = terminal_console()
    with TrainingProgress("a[/b]", 2, console=console) as progress:
        progress.update(1, {"loss": 0.5})
    assert "a[/b]" in shown(console)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "TERM": "dumb"}])
def test_no_color_and_a_dumb_terminal_get_plain_lines(environment: dict[str, str]) -> None:
    console, watch = terminal_console(**environment), Watch()
    console.is_interactive = not console.is_dumb_terminal  # what rich decides when it is not forced
    with TrainingProgress("dpo", 4, console=console, clock=watch) as progress:
        progress.update(2, {"loss": 0.5})
    with Steps("encoding", 4, console=console, clock=watch) as steps:
        steps.advance(2)
    assert shown(console) == "dpo: 2/4, left 0:00, loss 0.5, elapsed 0:00\nencoding: 2/4, left 0:00, elapsed 0:00\n"


def test_a_terminal_without_unicode_gets_plain_lines() -> None:
    written = io.BytesIO()
    ascii_file = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    console = Console(file=ascii_file, width=80, force_terminal=True, force_interactive=True)
    with TrainingProgress("dpo", 4, console=console, clock=Watch()) as progress:
        progress.update(2, {})
    assert written.getvalue() == b"dpo: 2/4, left 0:00, elapsed 0:00\n"


def test_tracking_gives_the_same_items() -> None:
    assert list(track(iter("abc"), "encoding", 3, unit="rows", rank=1)) == ["a", "b", "c"]


def test_a_display_inside_another_does_not_raise() -> None:
    console = terminal_console()
    with TrainingProgress("dpo", 2, console=console) as progress:
        progress.update(1, {"loss": 0.5})
        with Steps("sampling", 2, console=console) as steps:
            steps.advance(2)
        progress.update(2, {"loss": 0.4})
    assert "2/2" in shown(console)
