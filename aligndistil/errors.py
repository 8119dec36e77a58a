"""What can go wrong through no fault of the program, and the exit code that says so.

A `UserError` is shown as one sentence, without a traceback. Anything else that is raised is a bug: exit code 1, with
its traceback. The functions at the end are the words of sentences that guess what was meant, and list what there is.
"""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

from rich.markup import escape

EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_SERVICE = 4
EXIT_DIVERGED = 5
EXIT_SIGINT = 130
EXIT_SIGKILL = 137
EXIT_SIGTERM = 143


class UserError(Exception):
    """The command line, the recipe or the data is wrong: exit code 2. The message says where, and what to do."""

    exit_code = EXIT_USAGE


class MissingError(UserError):
    """An optional dependency or the hardware that the recipe asks for is not here: exit code 3."""

    exit_code = EXIT_MISSING


class ServiceError(UserError):
    """Something outside this machine (the Hub, say) failed or timed out: exit code 4."""

    exit_code = EXIT_SERVICE


class DivergedError(UserError):
    """The loss is not finite, the first step contradicts what the objective knows of itself, or samples are not the
    model's: exit code 5."""

    exit_code = EXIT_DIVERGED


class Interrupted(UserError):
    """A signal asked to stop, and all that was learnt is saved: exit code 143, or 130 after Ctrl-C."""

    def __init__(self, message: str, exit_code: int = EXIT_SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known words most like this one, best first, whatever their case; `-` is as good as `_`."""
    by_normal = {name.lower().replace("-", "_"): name for name in known}
    found = get_close_matches(word.lower().replace("-", "_"), by_normal, n=count, cutoff=cutoff)
    return [by_normal[name] for name in found]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    return "".join(f"; did you mean `{name}`?" for name in nearest(word, known))


def listed(words: Iterable[str], joint: str = "and") -> str:
    """`a`, `b` and `c`."""
    *most, last = [f"`{word}`" for word in words] or ["none"]
    return f"{', '.join(most)} {joint} {last}" if most else last


def guess_and_list(word: str, known: Iterable[str], what: str) -> str:
    """`; did you mean ...? The stages are ...`."""
    known = list(known)
    guess = did_you_mean(word, known)
    return f"{guess} The {what} are {listed(known)}" if guess else f"; the {what} are {listed(known)}"


def shortened(text: str) -> str:
    """As much of a text as a sentence has room for."""
    return text if len(text) <= 80 else f"{text[:60]}..."


_SECRET = re.compile(
    # https://USER:PASSWORD@HOST, as a path (https:/...), and cut before the host; a port is digits
    r"(?<=://)[^/\s]+(?=@)|(?<=[^/]:/)[^/\s:]+:[^/\s]+(?=@)|(?<=://)[^/\s@:\[]+:(?!\d+\b)[^/\s@'\"]+"
    r"|(?<=[?&]token=)[^&\s]+|(?<=[?&]sig=)[^&\s]+|(?<=[?&]key=)[^&\s]+|(?<=X-Amz-Signature=)[^&\s]+"
    r"|\bhf_[A-Za-z0-9]{30,}"
)


def holds_secret(text: str) -> bool:
    """Whether a text holds a password in a URL, a signature of one, or a token of the Hub."""
    return _SECRET.search(text) is not None


def printable(text: str) -> str:
    """Text without what a terminal would obey, and without passwords: names and paths come from elsewhere."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape", "surrogatepass").decode()
        for one in _SECRET.sub("***", text)
    )


def for_console(text: object) -> str:
    """Text for a console of rich, which is to read no markup in it, nor the terminal a command."""
    return escape(printable(str(text)))


_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|Cannot allocate memory|CUDA out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator: torch's for the CPU raises a plain RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch is not imported here
    return named or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)


_OF_THE_SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than it may be here",
    errno.EROFS: "the disk can only be read",
    errno.EIO: "the disk does not work",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "the name is too long for a file; give a shorter one",
    errno.EMFILE: "too many files are open; raise the limit (`ulimit -n`)",
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITERS = re.compile(
    r"inline_container\.cc|PytorchStreamWriter|file write failed|os error (28|27|122)\b|iostream error"
)
"""What torch and safetensors say of a write that failed; torch does not say why."""


def of_the_system(error: Exception) -> UserError | None:
    """What to say of an error that is this machine's: no memory, a full disk, a forbidden or impossible path.

    None for others.
    """
    if out_of_memory(error):
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return MissingError(
            f"there is not enough memory ({shortened(first)}); lower the batch size of what was running"
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or (not isinstance(error, OSError) and _WRITERS.search(str(error))):
        what = _OF_THE_SYSTEM.get(number or 0, "a file could not be written, most likely because the disk is full")
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return MissingError(
            f"{what}{where}; nothing that was complete is lost: make room, and run the same command to go on, or give "
            "--set output_dir=ANOTHER"
        )
    if number in _OF_THE_SYSTEM and isinstance(error, OSError) and error.filename:
        path = str(error.filename)
        return UserError(f"{shortened(path) if number == errno.ENAMETOOLONG else path}: {_OF_THE_SYSTEM[number]}")
    return None
