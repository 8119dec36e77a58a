"""What is said of errors, and what never reaches a terminal."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from aligndistil.errors import (
    EXIT_MISSING,
    EXIT_USAGE,
    for_console,
    holds_secret,
    of_the_system,
    out_of_memory,
    printable,
    shortened,
)

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("https://me:secret@host/x.jsonl", "https://***@host/x.jsonl"),
        ("https://secret@host/x", "https://***@host/x"),
        ("https:/me:secret@host/x", "https:/***@host/x"),
        ("https://me:sec@ret@host/x", "https://***@host/x"),
        ("no such id: 'https://me:secret'", "no such id: 'https://***'"),
        ("https://h/x?a=1&sig=secret&b=2", "https://h/x?a=1&sig=***&b=2"),
        ("https://h/x?token=secret", "https://h/x?token=***"),
        (f"the token {TOKEN} is wrong", "the token *** is wrong"),
        ("http://localhost:8000/v1", None),
        ("http://[::1]:8000/v1", None),
        ("hf://datasets/owner/name@main/x", None),
        ("owner/name@revision", None),
        ("10:30 and a/b@c", None),
        ("hf_short", None),
    ],
)
def test_passwords_and_tokens_are_masked_and_nothing_else(text: str, seen: str | None) -> None:
    assert printable(text) == (text if seen is None else seen)
    assert holds_secret(text) == (seen is not None)


@pytest.mark.parametrize("text", ["a[/]b", "a[bold]b", "[red", "end\\", "\x1b[31mred", "\x07\x9b2J", "\u202e"])
def test_a_console_shows_any_text_as_it_is(text: str) -> None:
    console = Console(force_terminal=True, width=200, color_system=None)
    with console.capture() as captured:
        console.print(f"[bold]{for_console(text)}[/] after")
    shown = captured.get().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert shown == f"{printable(text)} after\n"
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "run/x.pt"), EXIT_MISSING, r"the disk is full \(run/x.pt\)"),
        (OSError(errno.EDQUOT, "Quota"), EXIT_MISSING, "quota is used up"),
        (RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 1"), EXIT_MISSING, "disk is full"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0"),
            EXIT_MISSING,
            "disk is full",
        ),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), EXIT_USAGE, "^/x/y: permission denied"),
        (OSError(errno.EROFS, "Read-only", "/x/y"), EXIT_USAGE, "^/x/y: the disk can only be read"),
        (OSError(errno.ENAMETOOLONG, "long", "n" * 300), EXIT_USAGE, r"^n{60}\.\.\.: the name is too long"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), EXIT_MISSING, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), EXIT_MISSING, "not enough memory"),
        (MemoryError(), EXIT_MISSING, "not enough memory"),
    ],
)
def test_what_this_machine_lacks_is_a_sentence(error: Exception, code: int, said: str) -> None:
    found = of_the_system(error)
    assert found is not None
    assert found.exit_code == code
    with pytest.raises(type(found), match=said):
        raise found


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "x"), RuntimeError("a bug"), KeyError("x"), ValueError("x")],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert of_the_system(error) is None
    assert not out_of_memory(error)


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_is_known_by_what_its_writers_raise(writer: str, tmp_path: Path) -> None:
    """In a process of its own whose files may have 4 KB: what these versions say is what is looked for."""
    code = f"""
import resource, sys, torch, safetensors.torch
from aligndistil.errors import of_the_system
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
tensors = {{"a": torch.ones(10_000)}}
try:
    torch.save(tensors, "x") if {writer == "torch"} else safetensors.torch.save_file(tensors, "x")
except Exception as error:
    sys.exit(0 if of_the_system(error) is not None else repr(error))
sys.exit("written")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_allocator_without_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert out_of_memory(caught.value)


def test_long_values_are_cut() -> None:
    assert shortened("x" * 80) == "x" * 80
    assert shortened("9" * 5000) == "9" * 60 + "..."
