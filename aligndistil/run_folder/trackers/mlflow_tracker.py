"""MLflow: the server or store that MLFLOW_TRACKING_URI names, or else a SQLite file in the run folder."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aligndistil.errors import ServiceError
from aligndistil.run_folder.trackers.base import PROJECT, earlier_id, ends_badly, keep_id, resolved_recipe, run_name

logger = logging.getLogger(__name__)

PARAMETERS_AT_ONCE, LONGEST_PARAMETER = 100, 500
"""What every MLflow store takes."""


class MLflow:
    """One MLflow run a stage, in the experiment of MLFLOW_EXPERIMENT_NAME (`aligndistil`)."""

    def __init__(self, stage_folder: Path, start_step: int) -> None:
        # By default MLflow tries for minutes, and training waits for it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric, self._parameter = Metric, Param
        self._error: type[Exception] = mlflow.MlflowException
        local = f"sqlite:///{stage_folder.resolve().parent / 'mlflow.db'}"
        uri = None if mlflow.is_tracking_uri_set() else local
        with self._service():
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._id = self._resumed(earlier_id(stage_folder, "mlflow", start_step)) or self._new(stage_folder)
        keep_id(stage_folder, "mlflow", self._id)
        logger.info("mlflow: run %s in %s", run_name(stage_folder), uri or mlflow.get_tracking_uri())

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        values = [self._metric(f"{split}/{name}", value, now, step) for name, value in metrics.items()]
        with self._service():
            self._client.log_batch(self._id, metrics=values)

    def close(self) -> None:
        with self._service():
            self._client.set_terminated(self._id, status="FAILED" if ends_badly() else "FINISHED")

    def _resumed(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except self._error as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # it is in another store
        return run_id

    def _new(self, stage_folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment_id, run_name=run_name(stage_folder)).info.run_id
        parameters = [self._parameter(key, value) for key, value in flat(resolved_recipe(stage_folder)).items()]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        return run_id

    @contextmanager
    def _service(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise ServiceError(str(error)) from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"train": {"seed": 1}}` as `{"train.seed": "1"}`; a long value keeps its start."""
    pairs: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs[f"{prefix}{key}"] = text[:LONGEST_PARAMETER]
    return pairs
