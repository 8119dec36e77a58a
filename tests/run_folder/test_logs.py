"""What goes to the file, and what a person sees."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich
from rich.console import Console

from aligndistil.run_folder import adopt_loggers, setup_logging


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the console shows; logging as it was afterwards."""
    text = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=text, width=200))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield text
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_our_records_go_to_the_console_and_the_file(tmp_path: Path, screen: io.StringIO) -> None:
    setup_logging(0, tmp_path / "logs" / "rank-0.log")
    logging.getLogger("aligndistil.data").info("12 rows dropped [chosen is empty]")
    assert "12 rows dropped [chosen is empty]" in screen.getvalue()
    assert "aligndistil.data: 12 rows dropped" in (tmp_path / "logs/rank-0.log").read_text()


def test_other_ranks_write_to_their_file_only(tmp_path: Path, screen: io.StringIO) -> None:
    setup_logging(1, tmp_path / "rank-1.log")
    logging.getLogger("aligndistil").error("gone")
    assert screen.getvalue() == ""
    assert "gone" in (tmp_path / "rank-1.log").read_text()


def test_warnings_of_libraries_go_to_the_file_and_their_errors_to_both(tmp_path: Path, screen: io.StringIO) -> None:
    setup_logging(0, tmp_path / "log")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", FutureWarning, stacklevel=1)
    logging.getLogger("transformers.generation").warning("attention mask")
    logging.getLogger("DeepSpeed").error("out of memory")
    assert "old way" not in screen.getvalue()
    assert "attention mask" not in screen.getvalue()
    assert "out of memory" in screen.getvalue()
    written = (tmp_path / "log").read_text()
    assert all(words in written for words in ("old way", "attention mask", "out of memory"))


def test_deepspeeds_own_handler_is_taken_away(
    tmp_path: Path, screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(0, tmp_path / "log")
    library = logging.getLogger("DeepSpeed")
    library.addHandler(logging.StreamHandler(sys.stdout))
    library.propagate = False
    adopt_loggers()
    library.warning("loss scale")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "log").read_text().count("loss scale") == 1


def test_the_next_stage_gets_its_own_file(tmp_path: Path, screen: io.StringIO) -> None:
    setup_logging(0, tmp_path / "first")
    setup_logging(0, tmp_path / "second")
    logging.getLogger("aligndistil").info("hello")
    assert (tmp_path / "first").read_text() == ""
    assert (tmp_path / "second").read_text().count("hello") == 1
    assert screen.getvalue().count("hello") == 1


def test_a_resumed_stage_appends(tmp_path: Path, screen: io.StringIO) -> None:
    for word in ("one", "two"):
        setup_logging(0, tmp_path / "log")
        logging.getLogger("aligndistil").info(word)
    assert [line.split()[-1] for line in (tmp_path / "log").read_text().splitlines()] == ["one", "two"]
