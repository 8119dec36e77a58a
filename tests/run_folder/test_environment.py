"""What is written about the machine."""

import subprocess
import sys
from pathlib import Path

from aligndistil.run_folder.environment import Environment, git_state, installed_version


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_are_found_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from aligndistil.run_folder import Environment; e = Environment.collect(); "
        "assert e.packages['torch'] and e.packages['pydantic']; "
        "print({'torch', 'transformers', 'deepspeed', 'huggingface_hub', 'matplotlib'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "set()"


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert installed_version("no-such-distribution") is None


def test_an_environment_survives_json() -> None:
    environment = Environment.collect(world_size=8, devices=["H200"] * 8)
    assert Environment.model_validate_json(environment.model_dump_json()) == environment
    assert environment.command == sys.argv


def test_git_revision_and_dirt_are_those_of_tracked_files(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "runs").write_text("untracked")
    state = git_state(tmp_path)
    assert state is not None
    assert (state.revision, state.dirty) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    changed = git_state(tmp_path)
    assert changed is not None
    assert changed.dirty
