"""`--dry-run` says of each stage what `train` then does with it, and says it in the same words."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands.plan import plan
from aligndistil.commands.train import run_recipe
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
        return to / "two.yaml"

    return copy


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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
    fresh = how.get("fresh", False)

    planned = dict(sentences(map(str, plan(loaded, None, 1, fresh=fresh)), ", "))
    capsys.readouterr()
    run_recipe(loaded, fresh=fresh)
    done = dict(sentences(capsys.readouterr().out.splitlines(), ": "))

    for name, expected in zip(("sft", "dpo"), said, strict=True):
        assert expected in planned[name]
        if planned[name] == "to train":
            assert name not in done
        elif name == "dpo" and planned["sft"].startswith("trained"):  # what that becomes is known only then
            skipped, again = ("finished and unchanged", "an unfinished run"), "trained again because"
            assert done[name].startswith((again, *skipped) if "if" in planned[name] or expected == AS_BEFORE else again)
        else:
            assert done[name] == planned[name]


def sentences(lines: Iterator[str], after_name: str) -> Iterator[tuple[str, str]]:
    """By stage what a plan, or a training, says becomes of it; what it then trains is said elsewhere."""
    for line in lines:
        found = re.match(r"(?:\S )?(?:\[bold\])?(sft|dpo)(?:\[/\])?: (?:(?:sft|dpo), )?(.*)", line.strip())
        if found and not re.match(r"(sft|dpo) from |\d|reading", found[2]):
            yield found[1], found[2].split("; the old folder")[0]
