"""trackio: a local database, or the Space that TRACKIO_SPACE_ID names."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from aligndistil.errors import ServiceError
from aligndistil.run_folder.trackers.base import PROJECT, resolved_recipe, run_name

logger = logging.getLogger(__name__)


class Trackio:
    """One trackio run a stage. Its data lies where trackio keeps it (TRACKIO_DIR), so that `trackio show` finds it.

    trackio knows runs by name, and warns (in the stage's log file) rather than fails when a Space does not answer.
    """

    def __init__(self, stage_folder: Path, start_step: int) -> None:
        import trackio
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        name = run_name(stage_folder)
        try:
            # trackio prints half a dozen lines for a notebook's user.
            with redirect_stdout(io.StringIO()):
                self._run = trackio.init(
                    project=PROJECT,
                    name=name,
                    group=name.partition("/")[0],
                    config=resolved_recipe(stage_folder),
                    resume="allow" if start_step else "never",
                    embed=False,
                )
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise ServiceError(str(error)) from error
        self._finish = trackio.finish
        logger.info('trackio: run %s; see it with `trackio show --project "%s"`', name, PROJECT)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._finish()
