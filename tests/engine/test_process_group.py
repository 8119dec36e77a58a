"""Processes that a launcher started end together, with the same sentence, whichever of them has something to say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligndistil.engine.processes import launched_world, process_group
from aligndistil.errors import EXIT_DIVERGED, EXIT_MISSING, EXIT_USAGE, DivergedError, UserError


def ends(how: str, who: int) -> dict[str, Any]:
    """How this process ends where process `who` fails, in one way or another."""
    began, problem = time.monotonic(), DivergedError("the loss is nan")
    try:
        with process_group(0.25) as processes:
            mine = processes.rank == who
            if how == "agree":
                processes.agree(problem if mine else None)
            elif how == "on main":
                processes.on_main(lambda: _raise(problem))
            elif how == "alone" and mine:
                raise problem
            elif how == "bug" and mine:
                raise ValueError("no sentence")
            elif how == "memory" and mine:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            elif how == "hangs" and mine:
                time.sleep(30)
                return {}
            processes.sum(torch.ones(1))
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        return {"said": f"{type(error).__name__}: {error}", "code": code, "seconds": time.monotonic() - began}
    return {"said": "nothing"}


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("how", ["agree", "alone", "bug"])
def test_all_say_what_one_says(how: str, who: int, on_processes: Callable[..., list[Any]]) -> None:
    answers = on_processes(ends, how, who)
    if how == "bug":
        assert answers[who]["said"] == "ValueError: no sentence"
        other = answers[1 - who]
        assert other["said"].startswith(f"UserError: process {who} of 2 has failed: ValueError; its traceback")
        assert other["code"] == 1
        return
    for answer in answers:
        assert "the loss is nan" in answer["said"]
        assert answer["code"] == EXIT_DIVERGED
        assert answer["seconds"] < 25


def test_what_a_machine_lacks_is_said_by_the_others_too(on_processes: Callable[..., list[Any]]) -> None:
    answers = on_processes(ends, "memory", 1)
    assert answers[1]["said"].startswith("RuntimeError: DefaultCPUAllocator")
    assert answers[0]["said"].startswith("UserError: process 1 of 2 has failed: there is not enough memory")
    assert answers[0]["code"] == EXIT_MISSING


def test_what_only_the_first_refuses_ends_all(on_processes: Callable[..., list[Any]]) -> None:
    for answer in on_processes(ends, "on main", 0):
        assert answer["said"] == "DivergedError: the loss is nan"


def test_one_that_hangs_is_waited_for_as_long_as_the_recipe_says(on_processes: Callable[..., list[Any]]) -> None:
    waiting = on_processes(ends, "hangs", 1)[0]
    assert "process 0 of 2 waited 0.25 minutes for the others" in waiting["said"]
    assert "raise engine.timeout_minutes" in waiting["said"]
    assert waiting["code"] == EXIT_USAGE


@pytest.mark.parametrize("text", ["abc", "-1", "1.5"])
def test_variables_of_a_launcher_that_are_no_number_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=r"WORLD_SIZE is '.*', and launchers set it to a number"):
        launched_world()
