"""What a run ran on: versions, git revision, command line, processes and devices."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from aligndistil import __version__

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pydantic",
)


class Git(BaseModel):
    """The state of the git repository that the command was given in."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    revision: str
    dirty: bool
    """Whether a tracked file differs from the revision."""


class Environment(BaseModel):
    """Everything about the machine and the moment that a run's numbers may depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    date: datetime
    """UTC."""
    command: list[str]
    python: str
    platform: str
    cpus: int
    packages: dict[str, str | None]
    """Installed version by distribution name; null when it is not installed."""
    git: Git | None
    world_size: int
    devices: list[str]
    """One name an accelerator; empty on a CPU."""

    @classmethod
    def collect(cls, *, world_size: int = 1, devices: Sequence[str] = ()) -> Environment:
        """Describe this process. Versions come from package metadata, so nothing heavy is imported."""
        return cls(
            date=datetime.now(UTC).replace(microsecond=0),
            command=list(sys.argv),
            python=platform.python_version(),
            platform=platform.platform(),
            cpus=os.cpu_count() or 1,
            packages={"aligndistil": __version__, **{name: installed_version(name) for name in PACKAGES}},
            git=git_state(Path.cwd()),
            world_size=world_size,
            devices=list(devices),
        )


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> Git | None:
    """Revision and dirty flag of the repository around `folder`; None outside of one, or before its first commit."""
    if shutil.which("git") is None:
        return None
    revision = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    if revision is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return Git(revision=revision, dirty=bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
