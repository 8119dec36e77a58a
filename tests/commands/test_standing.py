"""`--dry-run` says of each stage what `train` then does with it, and says it in the same words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands.plan import plan
from aligndistil.commands.train import run_recipe
from aligndistil.models.places import _file_hash
from aligndistil.recipe import load_recipe
from support.recipes import off_policy

DPO = {"objective": {"name": "dpo"}, "models": {"reference": "stage:sft"}, "model": {"path": "stage:sft"}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., str]) -> Callable[[Path], Path]:
    """Copies a finished run of SFT and of DPO on it, with checkpoints, data and recipe; gives the recipe."""
    home = tmp_path_factory.mktemp("two")
    row = '{{"prompt": "w01", "chosen": "w{0:02d}", "rejected": "w{1:02d}"}}\n'
    (home / "pairs.jsonl").write_text("".join(row.format(i, i + 1) for i in range(8)))
    stage = off_policy(model_folder(seed=0), "pairs.jsonl", train={"max_steps": 3}, checkpoint={"every": 1})
    shared = {key: value for key, value in stage.items() if key not in ("objective", "models", "evaluation", "report")}
    shared["data"] = {"train": {"path": "pairs.jsonl"}}
    sft = {"objective": {"name": "sft"}}
    (home / "two.yaml").write_text(json.dumps({**shared, "stages": {"sft": sft, "dpo": DPO}}))
    with contextlib.chdir(home):
        run_recipe(load_recipe(home / "two.yaml", ["output_dir=run"]))

    def copy(to: Path) -> Path:
        shutil.copytree(home, to, dirs_exist_ok=True)
        _file_hash.cache_clear()  # another command is another process
        return to / "two.yaml"

    return copy


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_unseen(stage: Path) -> None:
    """As a disk does it: size and time stay."""
    file = stage / "final" / "model.safetensors"
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def unfinished(stage: Path) -> None:
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "final")


def without_checkpoints(stage: Path) -> None:
    unfinished(stage)
    for checkpoint in stage.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def damaged_checkpoint(stage: Path) -> None:
    unfinished(stage)
    flip(next((stage / "checkpoint-2").rglob("*.pt")))


SKIPPED, AS_BEFORE = "finished and unchanged, skipped (3 steps", "trained again unless `sft`"
SITUATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # what is said of sft and of dpo, and how it comes to that
    "untouched": (SKIPPED, SKIPPED, {}),
    "nothing there": ("to train", "to train", {"run": shutil.rmtree}),
    "one stage missing": (SKIPPED, "to train", {"dpo": shutil.rmtree}),
    "copied elsewhere": (SKIPPED, SKIPPED, {"sft": lambda stage: (stage / "final" / "config.json").touch()}),
    "final model flipped": (
        "trained again because its final model is not as training left it",
        AS_BEFORE,
        {"sft": lambda stage: flip(stage / "final" / "model.safetensors")},
    ),
    "final model flipped unseen": (SKIPPED, SKIPPED, {"dpo": flip_unseen}),
    "final model flipped unseen, and read": (
        SKIPPED,
        "trained again because its final model is not as training left it",
        {"dpo": flip_unseen, "verify": True},
    ),
    "weights deleted": (
        "trained again because its final model is not as training left it",
        AS_BEFORE,
        {"sft": lambda stage: (stage / "final" / "model.safetensors").unlink()},
    ),
    "final model deleted": (
        "trained again because its final model is gone",
        AS_BEFORE,
        {"sft": lambda stage: shutil.rmtree(stage / "final")},
    ),
    "last one deleted": (
        SKIPPED,
        "trained again because its final model is gone",
        {"dpo": lambda stage: shutil.rmtree(stage / "final")},
    ),
    "another learning rate": (
        "trained again because train.learning_rate changed from 0.001 to 0.002",
        "trained again because train.learning_rate changed from 0.001 to 0.002",
        {"set": ["train.learning_rate=0.002"]},
    ),
    "another rate of the first": (
        "trained again because train.learning_rate changed from 0.001 to 0.002",
        AS_BEFORE,
        {"set": ["stages.sft.train.learning_rate=0.002"]},
    ),
    "what does not count": (SKIPPED, SKIPPED, {"set": ["train.micro_batch_size=1", "checkpoint.keep=1"]}),
    "unfinished": (SKIPPED, "goes on after step 2", {"dpo": unfinished}),
    "unfinished, newest damaged": (SKIPPED, "goes on after step 1", {"dpo": damaged_checkpoint}),
    "unfinished without checkpoints": (SKIPPED, "left no whole checkpoint", {"dpo": without_checkpoints}),
    "unfinished, never resumed": (
        SKIPPED,
        "an unfinished run was here, and checkpoint.resume is never",
        {"dpo": unfinished, "set": ["checkpoint.resume=never"]},
    ),
    "unfinished and changed": (
        SKIPPED,
        "an unfinished run of another version of this stage was here",
        {"dpo": unfinished, "set": ["stages.dpo.objective.beta=0.3"]},
    ),
    "unfinished after a changed one": (
        "trained again because train.learning_rate changed",
        "an unfinished run is here, which goes on only if `sft`",
        {"dpo": unfinished, "set": ["stages.sft.train.learning_rate=0.002"]},
    ),
    "broken started.json": (
        SKIPPED,
        "an unfinished run of another version of this stage was here",
        {"dpo": lambda stage: (unfinished(stage), (stage / "started.json").write_bytes(b"\xff["))},
    ),
    "changed data": (
        "trained again because its data, its models or this package changed",
        "trained again because its data, its models or this package changed",
        {"pairs.jsonl": lambda file: file.write_text(file.read_text().replace("w03", "w09"))},
    ),
    "fresh": ("trained again because of --fresh", "trained again because of --fresh", {"fresh": True}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_dry_run_says_what_is_then_done(
    situation: str,
    two: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *said, how = SITUATIONS[situation]
    recipe, run = two(tmp_path), tmp_path / "run"
    for key, change in how.items():
        if callable(change):
            change(run if key == "run" else tmp_path / key if "." in key else run / key)
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(recipe, [*how.get("set", []), "output_dir=run"])
    asked = {option: how.get(option, False) for option in ("fresh", "verify")}

    planned = {"sft": "to train", "dpo": "to train"} | dict(sentences(map(str, plan(loaded, None, 1, **asked))))
    capsys.readouterr()
    run_recipe(loaded, **asked)
    done = dict(sentences(capsys.readouterr().out.splitlines()))

    for name, expected in zip(("sft", "dpo"), said, strict=True):
        assert expected in planned[name]
        if planned[name] == "to train":
            assert name not in done
        elif name == "dpo" and planned["sft"].startswith("trained"):  # what that becomes is known only then
            skipped, again = ("finished and unchanged", "an unfinished run"), "trained again because"
            assert done[name].startswith((again, *skipped) if "if" in planned[name] or expected == AS_BEFORE else again)
        else:
            assert done[name] == planned[name]


@pytest.mark.parametrize("read", ["generate", "evaluate", "evaluate final", "inspect"])
def test_a_final_model_that_is_not_as_training_left_it_is_not_read_as_if_it_were(
    read: str,
    two: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command_line: Callable[..., tuple[int, str, str]],
) -> None:
    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    final = Path("run") / "dpo" / "final"
    flip(final / "model.safetensors")
    arguments = {
        "generate": ["generate", final, "-p", "w01", "--max-new-tokens", "2"],
        "evaluate": ["evaluate", "run/dpo", "-b", "alpaca_eval", "--judge", "gold"],
        "evaluate final": ["evaluate", final, "-b", "alpaca_eval", "--judge", "gold"],
        "inspect": ["inspect", "run/dpo", "-p", "w01"],
    }[read]
    code, _, err = command_line(*arguments)
    assert code == 2
    assert "run/dpo/final is not as training left it: run `aligndistil train`" in err
    final.rename("copy")
    assert command_line("generate", "copy", "-p", "w01", "--max-new-tokens", "2")[0] == 0


def sentences(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """By stage what a plan, or a training, says becomes of it; what it then trains is said elsewhere."""
    for line in lines:
        found = re.match(r"(?:\S )?(?:\[bold\])?(sft|dpo)(?:\[/\])?: (.*)", line.strip())
        if found and not re.match(r"(sft|dpo) from |\d|reading", found[2]):
            yield found[1], found[2].split("; the old folder")[0]
