"""Training one stage: its data, models, engine, rollout and folder brought together, and the loop.

`loop` is the training itself, to be read first; `batches` makes what a step learns from, `preparation` lets the
objective look at it beforehand, `evaluation`, `log` and `checkpoints` are what happens now and then, `stage` puts it
together.
"""

from aligndistil.training.adapters import planned_models
from aligndistil.training.checks import Longest, check_lengths, check_positions, data_lines, model_lines
from aligndistil.training.data import StageData, gold_reward_of, load_stage_data
from aligndistil.training.python_reward import is_code, source_of
from aligndistil.training.stage import Outcome, StageTraining
from aligndistil.training.text_reward import TextReader, TextReward

__all__ = [
    "Longest",
    "Outcome",
    "StageData",
    "StageTraining",
    "TextReader",
    "TextReward",
    "check_lengths",
    "check_positions",
    "data_lines",
    "gold_reward_of",
    "is_code",
    "load_stage_data",
    "model_lines",
    "planned_models",
    "source_of",
]
