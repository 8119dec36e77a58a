"""Rollouts: token ids of prompts in, token ids of sampled responses out."""

from aligndistil.rollout.loaded_model import LoadedModel
from aligndistil.rollout.sampling import Sample, SamplingParams, sample_seed

__all__ = ["LoadedModel", "Sample", "SamplingParams", "sample_seed"]
