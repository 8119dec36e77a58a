"""The run folder: what was asked, on what machine, what came out. Only rank 0 writes here, logs apart."""

from aligndistil.artefacts.card import model_card
from aligndistil.artefacts.environment import Environment
from aligndistil.artefacts.folder import Done, RunFolder, StageFolder
from aligndistil.artefacts.logs import adopt_loggers, setup_logging
from aligndistil.artefacts.metrics import MetricsLog
from aligndistil.artefacts.trackers import Tracker, open_trackers

__all__ = [
    "Done",
    "Environment",
    "MetricsLog",
    "RunFolder",
    "StageFolder",
    "Tracker",
    "adopt_loggers",
    "model_card",
    "open_trackers",
    "setup_logging",
]
