"""What is printed: no command to a terminal, no markup, no password; and what is said of a machine's own troubles."""

from __future__ import annotations

import errno
import io

import pytest
from rich.console import Console

from aligndistil.errors import (
    EXIT_MISSING,
    EXIT_USAGE,
    for_console,
    holds_secret,
    of_the_system,
    out_of_memory,
    printable,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07", "a\\rb\\x07"),
        ("two\nlines", "two\nlines"),
        ("Äpfel 日本", "Äpfel 日本"),
        ("https://me:secret@host/file", "https://***@host/file"),
        ("s3://key:pass@host/a and https://b/c?token=abc&x=1", "s3://***@host/a and https://b/c?token=***&x=1"),
        (f"hf_{'a' * 34}", "***"),
        ("https://host/a@b", "https://host/a@b"),
        ("me@host.org", "me@host.org"),
    ],
)
def test_what_is_printed(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert holds_secret(text) == ("***" in shown)


@pytest.mark.parametrize("text", ["a[/]b", "[bold]x[/bold]", "[red]", "\x1b[2J[/]"])
def test_no_text_of_a_user_is_markup(text: str) -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(for_console(text))
    assert stream.getvalue() == printable(text) + "\n"


class OutOfMemoryError(RuntimeError):
    """As torch's of a card."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "/a/b"), EXIT_MISSING, "the disk is full (/a/b)"),
        (OSError(errno.EDQUOT, "Quota", "/a/b"), EXIT_MISSING, "the disk quota is used up"),
        (RuntimeError("[enforce fail at inline_container.cc:868] . PytorchStreamWriter failed"), EXIT_MISSING, "full"),
        (OutOfMemoryError("CUDA out of memory. Tried"), EXIT_MISSING, "not enough memory (CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), EXIT_MISSING, "not enough memory"),
        (MemoryError(), EXIT_MISSING, "not enough memory (MemoryError)"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), EXIT_USAGE, "/root/x: permission denied"),
        (OSError(errno.ENAMETOOLONG, "long", "x" * 300), EXIT_USAGE, "give a shorter one"),
    ],
)
def test_what_a_machine_lacks_is_said_in_a_sentence(error: Exception, code: int, said: str) -> None:
    found = of_the_system(error)
    assert found is not None
    assert found.exit_code == code
    assert said in str(found)
    assert len(str(found)) < 400


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("size mismatch"), FileNotFoundError(errno.ENOENT, "x")]
)
def test_a_bug_stays_one(error: Exception) -> None:
    assert of_the_system(error) is None
    assert not out_of_memory(error)
