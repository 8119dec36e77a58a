"""What trained models are worth, on the same held-out prompts and pairs.

`plan` says what a recipe's comparison measures, `build` reads the `bench` it is measured on, `model` measures one
model, `rewards` ranks pairs.
"""

from aligndistil.evaluation.bench import Bench
from aligndistil.evaluation.build import bench_of, evaluator_of
from aligndistil.evaluation.model import Evaluator, Measured, ModelToEvaluate, PairValues
from aligndistil.evaluation.plan import INITIAL, Plan, initial_model, plan_of
from aligndistil.evaluation.rewards import AllPairs, Reward, rewards_of
from aligndistil.evaluation.samples import distinct_n, summarise

__all__ = [
    "INITIAL",
    "AllPairs",
    "Bench",
    "Evaluator",
    "Measured",
    "ModelToEvaluate",
    "PairValues",
    "Plan",
    "Reward",
    "bench_of",
    "distinct_n",
    "evaluator_of",
    "initial_model",
    "plan_of",
    "rewards_of",
    "summarise",
]
