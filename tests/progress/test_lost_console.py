"""What cannot be printed stops no training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import rich
from aligndistil.progress import console_may_be_lost
with console_may_be_lost():
    for number in range(3000):
        rich.print(f"line {number}")
        print(f"error line {number}", file=sys.stderr)
print("the end", flush=True)
Path(sys.argv[1]).write_text("trained")
"""


@pytest.mark.parametrize("where", ["| head -1", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&-"])
def test_a_console_that_cannot_be_written_is_given_up(where: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"set -o pipefail; {sys.executable} program.py done {where}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "done").read_text() == "trained"
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
