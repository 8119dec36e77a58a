"""Weights & Biases: online where this machine is logged in, offline elsewhere. Never asks for a login."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aligndistil.errors import ServiceError
from aligndistil.run_folder.trackers.base import PROJECT, earlier_id, ends_badly, keep_id, resolved_recipe, run_name

logger = logging.getLogger(__name__)

SECONDS_TO_START, SECONDS_TO_FINISH = 30.0, 120.0
"""How long a server that does not answer may hold up a stage; what was not sent stays on disk, for `wandb sync`."""


class WeightsAndBiases:
    """One W&B run a stage, in the group of the recipe's run. WANDB_MODE, WANDB_PROJECT, WANDB_DIR ... are honoured."""

    def __init__(self, stage_folder: Path, start_step: int) -> None:
        wandb: Any = importlib.import_module("wandb")

        self._error: type[Exception] = wandb.Error
        # Before anything else of wandb's, or its notes on credentials are printed through the progress display.
        setup = wandb.setup(settings=wandb.Settings(silent=True))
        mode, why = _mode(wandb, setup.settings.mode)
        name = run_name(stage_folder)
        arguments: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": name,
            "group": name.partition("/")[0],
            "id": earlier_id(stage_folder, "wandb", start_step),
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR", str(stage_folder)),
            "config": resolved_recipe(stage_folder),
            "settings": _settings(wandb),
        }
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except wandb.errors.CommError as error:
            why = str(error).partition("\n")[0]
            self._run = self._offline(wandb, arguments)
        except wandb.Error as error:
            raise ServiceError(str(error)) from error
        if why:
            logger.info(
                "wandb: %s, so the run stays offline; `wandb sync %s` sends it later", why, Path(self._run.dir).parent
            )
        elif self._run.url:
            logger.info("wandb: %s", self._run.url)
        keep_id(stage_folder, "wandb", self._run.id)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        try:
            self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)
        except self._error as error:
            raise ServiceError(str(error)) from error

    def close(self) -> None:
        try:
            self._run.finish(exit_code=int(ends_badly()))
        except self._error as error:
            raise ServiceError(str(error)) from error

    def _offline(self, wandb: Any, arguments: dict[str, Any]) -> Any:
        try:
            wandb.teardown()  # or its service still holds the id of the run that failed
            return wandb.init(mode="offline", **arguments)
        except wandb.Error as error:
            raise ServiceError(str(error)) from error


def _mode(wandb: Any, asked: str) -> tuple[str | None, str]:
    """The mode for `wandb.init` (None: as asked), and why it is not the one that was asked for."""
    if asked not in ("online", "run"):
        return None, ""
    try:
        # Online mode without credentials would ask for them on the terminal, and wait.
        known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        return "offline", str(error).partition("\n")[0]
    return (None, "") if known else ("offline", "this machine is not logged in (`wandb login`, WANDB_API_KEY)")


def _settings(wandb: Any) -> Any:
    """Neither the console nor code leaves the machine."""
    waits = {"init_timeout": SECONDS_TO_START, "finish_timeout": SECONDS_TO_FINISH}
    return wandb.Settings(
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        silent=True,
        **{name: value for name, value in waits.items() if f"WANDB_{name.upper()}" not in os.environ},
    )
