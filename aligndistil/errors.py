"""What can go wrong through no fault of the program, and the exit code that says so.

A `UserError` is shown as one sentence, without a traceback. Anything else that is raised is a bug and keeps its
traceback.
"""

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_SERVICE = 4
EXIT_DIVERGED = 5
EXIT_SIGINT = 130
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
    """The loss is not finite, or the first step contradicts what the objective knows of itself: exit code 5."""

    exit_code = EXIT_DIVERGED


class Interrupted(UserError):
    """SIGTERM arrived and a checkpoint was saved: exit code 143."""

    exit_code = EXIT_SIGTERM
