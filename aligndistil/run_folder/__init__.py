"""The run folder: what was asked, on what machine, what came out. Only rank 0 writes here, logs apart."""

from aligndistil.run_folder.card import add_comparison, license_of, model_card
from aligndistil.run_folder.environment import Environment
from aligndistil.run_folder.folder import (
    Done,
    RunFolder,
    StageFolder,
    check_as_trained,
    section_of,
    sizes_and_times,
)
from aligndistil.run_folder.logs import adopt_loggers, setup_logging
from aligndistil.run_folder.metrics import MetricsLog
from aligndistil.run_folder.trackers import Tracker, open_trackers

__all__ = [
    "Done",
    "Environment",
    "MetricsLog",
    "RunFolder",
    "StageFolder",
    "Tracker",
    "add_comparison",
    "adopt_loggers",
    "check_as_trained",
    "license_of",
    "model_card",
    "open_trackers",
    "section_of",
    "setup_logging",
    "sizes_and_times",
]
