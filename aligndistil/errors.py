"""What can go wrong through no fault of the program, and the exit code that says so.

A `UserError` is shown as one sentence, without a traceback. Anything else that is raised is a bug: exit code 1, with
its traceback. The functions at the end are the words of sentences that guess what was meant, and list what there is.
"""

from collections.abc import Iterable
from difflib import get_close_matches

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


def printable(text: str) -> str:
    """Text without what a terminal would obey: names of columns and files come from elsewhere."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )
