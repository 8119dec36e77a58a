"""Rollouts: token ids of prompts in, token ids of sampled responses out."""

from aligndistil.rollout.sampling import Sample, SamplingParams, sample_seed
from aligndistil.rollout.transformers_engine import TransformersRollout

__all__ = ["Sample", "SamplingParams", "TransformersRollout", "sample_seed"]
