"""What a trained model is worth: reward accuracy on held-out pairs; length, reward and divergence of its samples."""

from aligndistil.evaluation.model import Evaluator, Measured, ModelToEvaluate
from aligndistil.evaluation.samples import distinct_n, summarise

__all__ = ["Evaluator", "Measured", "ModelToEvaluate", "distinct_n", "summarise"]
