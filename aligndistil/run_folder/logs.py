"""Logging: everything into STAGE/logs/rank-N.log, and on rank 0 what a person needs to see on the console."""

from __future__ import annotations

import logging
from pathlib import Path

import rich
from rich.logging import RichHandler

from aligndistil.errors import printable

QUIET = ("urllib3", "DeepSpeed", "transformers", "datasets", "torch", "py.warnings")
"""Loggers whose warnings go to the file only; their errors are shown."""
OWN = "aligndistil"
FILE, CONSOLE = "aligndistil.file", "aligndistil.console"


def setup_logging(rank: int, file: Path) -> None:
    """Append log records and Python warnings to `file`, and show rank 0's on the console. Call again for each stage.

    Call `adopt_loggers` after the heavy imports: DeepSpeed and transformers give their loggers handlers of their own
    when they are imported.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.get_name() in (FILE, CONSOLE)]:
        root.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(_Printable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_file.set_name(FILE)
    root.addHandler(to_file)
    if rank == 0:
        root.addHandler(_console_handler())
    root.setLevel(logging.WARNING)
    logging.getLogger(OWN).setLevel(logging.INFO)
    logging.captureWarnings(True)
    adopt_loggers()


def adopt_loggers() -> None:
    """Take away the handlers that libraries give their own loggers (DeepSpeed's writes to stdout)."""
    for name in QUIET:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True


class _Printable(logging.Formatter):
    """Libraries log names, paths and addresses as they were given."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _console_handler() -> logging.Handler:
    # The console that progress bars use, so that a line is printed above them and not through them.
    console = rich.get_console()
    handler: logging.Handler
    if console.is_interactive:
        handler = RichHandler(console=console, show_path=False, show_time=False)
        handler.setFormatter(_Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or not record.name.startswith(QUIET))
    handler.set_name(CONSOLE)
    return handler
