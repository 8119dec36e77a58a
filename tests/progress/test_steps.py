"""Steps that are counted: on a terminal, in a file, and on the other ranks."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from aligndistil.progress import Steps, duration


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


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def last_line(console: Console) -> str:
    return [line.rstrip() for line in plain(shown(console)).splitlines() if line.strip()][-1]


FILLED = "\x1b[32m" + "━" * 10 + "\x1b[0m"
"""In green, at 80 columns."""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_durations_read_as_a_clock_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_outside_a_terminal_there_is_a_line_every_fifteen_seconds_and_one_at_the_end() -> None:
    console, watch = file_console(), Watch()
    with Steps("a[b]", 100, unit="rows", console=console, clock=watch) as steps:
        for _ in range(100):
            watch.now += 0.5
            steps.advance(values={"last": "[x]"})
    lines = shown(console).splitlines()
    # 50 seconds: at 0.5, 15.5, 30.5, 45.5, and the last step.
    assert [line.split(" ")[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[1] == "a[b]: 31/100 rows, left 0:34, last [x], elapsed 0:16"
    assert lines[-1] == "a[b]: 100/100 rows, last [x], elapsed 0:50"


def test_time_left_counts_only_the_steps_of_this_run() -> None:
    console, watch = file_console(), Watch()
    with Steps("dpo", 100, start=90, console=console, clock=watch) as steps:
        watch.now += 10
        steps.advance()
    assert shown(console) == "dpo: 91/100, left 1:30, elapsed 0:10\n"


def test_a_plain_line_without_a_total_has_the_count_alone() -> None:
    console, watch = file_console(), Watch()
    with Steps("reading", unit="rows", console=console, clock=watch) as steps:
        watch.now += 10
        steps.advance(512)
        steps.total = 600
        steps.advance(88)
    assert shown(console) == "reading: 512 rows, elapsed 0:10\nreading: 600/600 rows, elapsed 0:10\n"


@pytest.mark.parametrize("options", [{"rank": 1}, {"hidden": True}])
def test_other_ranks_and_hidden_steps_say_nothing(options: dict[str, Any]) -> None:
    for console in (file_console(), terminal_console()):
        with Steps("dpo", 2, console=console, **options) as steps:
            steps.advance()
        assert shown(console) == ""
        assert steps.count == "1/2"


def test_a_terminal_shows_a_bar_and_everything_else_in_eighty_columns() -> None:
    console, watch = terminal_console(), Watch()
    with Steps("comparing models", 500, unit="models", console=console, clock=watch) as steps:
        watch.now += 240
        steps.advance(120, {"now": "aligndistil"})
    last = last_line(console)
    assert re.fullmatch(r"comparing models [━╸╺]{10} 4:00 120/500 models, left 12:40, now aligndistil", last)
    assert len(last) <= 80


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_has_fewer_figures_and_only_whole_ones(width: int) -> None:
    console, watch = terminal_console(width), Watch()
    with Steps("comparing models", 50, console=console, clock=watch) as steps:
        watch.now += 240
        steps.advance(12, {"now": "a_model_with_a_long_name"})
    last = last_line(console)
    assert len(last) <= width
    assert last.split(" ", 3)[3] == "12/50, left 12:40"


@pytest.mark.parametrize("width", [50, 60, 80])
@pytest.mark.parametrize("stage", ["dpo", "aligndistil", "a_stage_with_a_very_long_name_of_its_own"])
def test_a_bar_is_one_line_with_its_count_on_any_terminal(width: int, stage: str) -> None:
    console, watch = terminal_console(width), Watch()
    with Steps(f"{stage}: reading train prompts", unit="rows", console=console, clock=watch) as steps:
        steps.total = 61_135
        watch.now += 10
        steps.advance(1000)
        during = last_line(console)
        steps.advance(60_135)
    for line, count in ((during, "1000/61135 rows"), (last_line(console), "61135/61135 rows")):
        assert len(line) <= width
        assert count in line
        assert line.startswith(stage[:20])
    assert all(len(line.rstrip()) <= width for line in plain(shown(console)).splitlines())


def test_what_has_nothing_to_count_does_not_appear() -> None:
    console = terminal_console()
    with Steps("reading", unit="rows", console=console, clock=Watch()):
        pass
    with Steps("teacher cache", 0, unit="rows", console=console, clock=Watch()):
        pass
    with Steps("dpo", 94, start=94, console=console, clock=Watch()):
        pass
    assert shown(console) == ""


def test_what_has_a_total_is_there_before_its_first_step() -> None:
    console = terminal_console()
    with Steps("comparing models", 4, unit="models", console=console, clock=Watch()) as steps:
        assert last_line(console) == f"comparing models {'━' * 10} 0:00 0/4 models"
        steps.advance(4)


def test_a_bar_without_a_total_shows_none_and_ends_filled() -> None:
    console = terminal_console()
    with Steps("reading", unit="rows", console=console, clock=Watch()) as steps:
        steps.advance(7)
        assert "/" not in plain(shown(console))
    assert last_line(console) == f"reading {'━' * 10} 0:00 7/7 rows"
    assert FILLED in shown(console)


def test_a_bar_may_be_given_its_total_later() -> None:
    console = terminal_console()
    with Steps("reading", unit="rows", console=console, clock=Watch()) as steps:
        steps.total = 20
        steps.advance(20)
    assert last_line(console) == f"reading {'━' * 10} 0:00 20/20 rows"


def test_no_unfinished_bar_stays_on_the_screen() -> None:
    console = terminal_console()

    def interrupted(total: int | None) -> None:
        with Steps("reading", total, console=console, clock=Watch()) as steps:
            steps.advance()
            raise KeyboardInterrupt

    for total in (None, 3):
        with pytest.raises(KeyboardInterrupt):
            interrupted(total)
        assert FILLED not in shown(console)
        assert shown(console).endswith("\x1b[2K")  # the cursor is where the bar was, in an empty line
        assert shown(console).rindex("\x1b[?25h") > shown(console).rindex("\x1b[?25l")


def test_what_is_counted_may_have_brackets_in_its_name() -> None:
    console = terminal_console()
    with Steps("a[/b]", 2, console=console) as steps:
        steps.advance(values={"last": "[/c]"})
    assert "a[/b]" in last_line(console)
    assert "last [/c]" in last_line(console)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "TERM": "dumb"}])
def test_no_color_and_a_dumb_terminal_get_plain_lines(environment: dict[str, str]) -> None:
    console, watch = terminal_console(**environment), Watch()
    console.is_interactive = not console.is_dumb_terminal  # what rich decides when it is not forced
    with Steps("encoding", 4, console=console, clock=watch) as steps:
        steps.advance(2)
    assert shown(console) == "encoding: 2/4, left 0:00, elapsed 0:00\n"


def test_a_terminal_without_unicode_gets_plain_lines() -> None:
    written = io.BytesIO()
    ascii_file = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    console = Console(file=ascii_file, width=80, force_terminal=True, force_interactive=True)
    with Steps("encoding", 4, console=console, clock=Watch()) as steps:
        steps.advance(2)
    assert written.getvalue() == b"encoding: 2/4, left 0:00, elapsed 0:00\n"
