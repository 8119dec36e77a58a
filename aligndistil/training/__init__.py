"""One stage: its data, models, engine, rollout and folder brought together, and handed to the loop."""

from aligndistil.training.data import StageData, load_stage_data, scorer_of
from aligndistil.training.python_reward import is_code, source_of
from aligndistil.training.stage import Outcome, StageLaunch

__all__ = ["Outcome", "StageData", "StageLaunch", "is_code", "load_stage_data", "scorer_of", "source_of"]
