"""The folder of a run: where every file lies. All of them can be read without this package."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from aligndistil.errors import UserError
from aligndistil.files import is_partial, remove_partial, write_text
from aligndistil.run_folder.environment import Environment
from aligndistil.run_folder.metrics import MetricsLog
from aligndistil.run_folder.trackers import open_trackers

if TYPE_CHECKING:
    from aligndistil.recipe import Model

logger = logging.getLogger(__name__)
LOCK = ".lock"


class Done(BaseModel):
    """done.json: the stage is finished, and from what."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    fingerprint: str
    """Of everything the stage depends on; the stage is skipped as long as it is the same."""
    weights: str
    """SHA-256 of the final model: what depends on this stage depends on what it became, not on what was asked for."""
    files: dict[str, tuple[int, int]] = {}
    """Size and time of change, in nanoseconds, of the final model's files: what has both is not read again."""
    inputs: dict[str, str] = {}
    """`weights` of the stages whose models this one was trained with, by name."""
    step: int
    """Optimizer steps taken."""
    seconds: float
    """Wall time, of all attempts together."""
    metrics: dict[str, float]
    """The last values; those that are not finite are left out."""
    resolved: dict[str, Any]
    """The stage as it was trained, to say later what has changed."""

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


class StageFolder:
    """One stage's folder. Making the object makes no folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def final(self) -> Path:
        """The trained model, a normal Hugging Face folder."""
        return self.path / "final"

    @property
    def metrics(self) -> MetricsLog:
        """metrics.jsonl, without trackers."""
        return MetricsLog(self.path / "metrics.jsonl")

    def open_metrics(self, trackers: Sequence[str], start_step: int) -> MetricsLog:
        """metrics.jsonl as it was at `start_step`, ready for the next line. Raises as `open_trackers` does."""
        log = MetricsLog(self.metrics.path, open_trackers(trackers, self.path, start_step))
        log.truncate(start_step)
        return log

    def log_file(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank}.log"

    def write_resolved(self, resolved: Mapping[str, Any]) -> None:
        """recipe.resolved.yaml, from plain YAML values, in the order given."""
        text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True, width=120)
        write_text(self.path / "recipe.resolved.yaml", text)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write samples/step-NNNNNN.jsonl; the same step written again replaces it."""
        return self._write_samples(f"step-{step:06d}.jsonl", rows)

    def eval_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write samples/eval-NNNNNN.jsonl: the answers of an evaluation."""
        return self._write_samples(f"eval-{step:06d}.jsonl", rows)

    def _write_samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = self.path / "samples" / name
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def read_done(self) -> Done | None:
        """What done.json says; None when the stage is not finished. Raises UserError when it cannot be read."""
        path = self.path / "done.json"
        if not path.exists():
            return None
        try:
            return Done.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path} is not what aligndistil writes: delete it to train the stage again") from error

    @property
    def started(self) -> str:
        """started.json as it is, by which checkpoints know whose they are; nothing where there is none."""
        path = self.path / "started.json"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def was_started_as(self, fingerprint: str) -> bool:
        """Whether what is here was begun by a stage with this fingerprint."""
        path = self.path / "started.json"
        try:
            return bool(json.loads(path.read_bytes())["fingerprint"] == fingerprint)
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # not there, or not ours: begun as something else
            return False

    def write_started(self, fingerprint: str) -> None:
        """The first thing that happens to a stage."""
        write_text(self.path / "started.json", json.dumps({"fingerprint": fingerprint}) + "\n")

    def write_done(self, done: Done) -> None:
        """The last thing that happens to a stage."""
        write_text(self.path / "done.json", done.model_dump_json(indent=2) + "\n")

    def archive(self, label: str = "old") -> Path | None:
        """Move the stage's folder to STAGE.LABEL-N, N the next free number. None when there is nothing to move."""
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{label}-{number}")).exists():
            number += 1
        self.path.rename(target)
        logger.info("what was in %s is kept as %s", self.path, target)
        return target

    def clear_unfinished(self) -> None:
        """Remove what a killed process was writing, and nothing else."""
        for folder in (self.path, self.path / "samples"):
            remove_partial(folder)


def sizes_and_times(folder: Path) -> dict[str, tuple[int, int]]:
    """By name of a file: what has both is not read again."""
    states = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states}


def check_as_trained(path: str, hash_of: Callable[[str], str]) -> None:
    """Refuse the final model of a stage that is not what training left; it is read where size or time is another.

    `hash_of` gives what done.json calls `weights`. Raises UserError.
    """
    folder = Path(path)
    done = StageFolder(folder.parent).read_done() if folder.name == "final" else None
    if done is not None and done.files and sizes_and_times(folder) != done.files and hash_of(path) != done.weights:
        raise UserError(
            f"{path} is not as training left it: run `aligndistil train` on its recipe, which trains it again; to take "
            "it as it is, give a copy of the folder under another name"
        )


def section_of(path: str) -> Model:
    """How a model is loaded and asked: one that was trained here as it was trained, any other by defaults."""
    from aligndistil.recipe import Model  # takes torch, which nothing else here needs

    folder = Path(path)
    done = StageFolder(folder.parent).read_done() if folder.name == "final" else None
    if done is None:
        return Model(path=path)
    # The exported tokenizer has the chat template.
    return Model.model_validate(done.resolved["model"]).model_copy(update={"path": path, "chat_template": None})


class RunFolder:
    """The folder of one recipe's run. Making the object touches nothing; `open` does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def report(self) -> Path:
        return self.path / "report"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    @contextmanager
    def alone(self, recipe_name: str) -> Iterator[None]:
        """Make the folder, or find it again, and keep other processes out: they would write over each other's files.

        Nothing that is not ours is touched: raises UserError when the folder holds something else, the run of another
        recipe, cannot be made, or when another process works in it.
        """
        self._previous(recipe_name)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be made: {error.strerror}") from error
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output_dir: another process is working in {self.path}; wait for it, or give --set output_dir=ANOTHER"
            ) from None
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def check(self, recipe_name: str) -> None:
        """Refuse a folder that `open` refuses, and touch nothing."""
        self._previous(recipe_name)

    def open(self, recipe_name: str, source_text: str, environment: Environment) -> None:
        """Write recipe.yaml and environment.json, which keeps the environments of earlier commands under `earlier`.

        Raises UserError as `alone` does.
        """
        previous = self._previous(recipe_name)
        record = {"recipe": recipe_name, **environment.model_dump(mode="json")}
        if previous is not None:
            earlier = previous.pop("earlier")
            record["earlier"] = earlier if _same(previous, record) else [*earlier, previous]
        else:
            record["earlier"] = []
        try:
            # environment.json is the mark of a run folder, and comes first: a kill between the two leaves one of ours.
            write_text(self.path / "environment.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            write_text(self.path / "recipe.yaml", source_text)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from error

    def _previous(self, recipe_name: str) -> dict[str, Any] | None:
        if not self.path.is_dir() or all(is_partial(entry) or entry.name == LOCK for entry in self.path.iterdir()):
            return None
        record = _read_record(self.path / "environment.json")
        if record is None and any(_read_record(path) for path in self.path.glob("seed-*/environment.json")):
            raise UserError(
                f"output_dir: {self.path} holds the runs of several seeds: go on with `aligndistil compare RECIPE "
                "--seeds N`, or give another output_dir"
            )
        if record is None and (self.path / "environment.json").is_file():
            raise UserError(
                f"output_dir: {self.path}/environment.json, by which a run is known, is not what aligndistil writes: "
                "put the old one back, or give another output_dir"
            )
        if record is None:
            raise UserError(
                f"output_dir: {self.path} holds files that are not an aligndistil run: "
                "give another output_dir, or move them away"
            )
        if record["recipe"] != recipe_name:
            raise UserError(
                f"output_dir: {self.path} holds the run of the recipe {record['recipe']!r}, not of {recipe_name!r}: "
                "give another output_dir"
            )
        return record


def _read_record(path: Path) -> dict[str, Any] | None:
    """environment.json, if it is one that `RunFolder.open` wrote."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    ours = isinstance(record, dict) and {"recipe", "packages", "earlier"} <= record.keys()
    return record if ours else None


def _same(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments differ in their dates only."""
    ignored = {"date", "earlier"}
    return {k: v for k, v in record.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}
