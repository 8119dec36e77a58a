"""One stage: its data, models, engine, rollout and folder brought together, and handed to the loop."""

from aligndistil.launch.python_reward import is_code, source_of
from aligndistil.launch.stage import Outcome, StageLaunch
from aligndistil.launch.stage_data import StageData, load_stage_data, scorer_of

__all__ = ["Outcome", "StageData", "StageLaunch", "is_code", "load_stage_data", "scorer_of", "source_of"]
