"""The run folder: what was asked, on what machine, what came out. Only rank 0 writes here, logs apart."""

from aligndistil.run_folder.card import add_comparison, license_of, model_card
from aligndistil.run_folder.environment import Environment
from aligndistil.run_folder.folder import Done, RunFolder, StageFolder, section_of
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
    "license_of",
    "model_card",
    "open_trackers",
    "section_of",
    "setup_logging",
]
