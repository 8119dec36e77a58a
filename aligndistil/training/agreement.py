"""Whether generation samples from the policy that is trained: both say how likely each sampled token is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aligndistil.engine.engine import Engine
from aligndistil.maths import mean_of
from aligndistil.training.batches import StepBatch
from aligndistil.training.metrics import Sums

LOGP_DIFF = "rollout/logp_diff"
LIMITS = {torch.float32: 0.01, torch.bfloat16: 0.25}
"""Nats a token, on average, that may be rounding. Families of transformers that are right differ by up to 6e-6 in
float32 and 0.03 in bfloat16 (a hybrid of 12 random layers by 0.2), those that are wrong by 0.4 and more. The largest
difference has no limit: in bfloat16 a router that chooses another expert moves a token by nats."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far apart the two are on the samples of all processes."""

    sums: Sums
    """The metrics."""
    problem: str = ""
    """A sentence, where it is more than rounding."""


def compare_sampling(engine: Engine, batch: StepBatch) -> Agreement:
    """The response tokens of a step batch as its `sampled_logp_BT` has them, and as the policy does.

    The first are what generation gave the tokens, at temperature 1 and zero elsewhere: generation with the policy
    itself, or by an engine that was just sent its weights. Collective; every process has as many micro-batches.
    """
    sums, worst = Sums(), (-1.0, 0.0, 0.0)
    assert batch.sampled_logp_BT is not None
    for rows in batch.micro_batches:
        one = batch.batch.take(rows)
        generated = batch.sampled_logp_BT[list(rows), : one.width][one.response_BT]
        trained = engine.log_probabilities(one).cpu()[one.response_BT]
        difference = (trained - generated).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        sums.add_metric(LOGP_DIFF, mean_of(difference))
        sums.add_maximum(f"{LOGP_DIFF}_max", difference.max())
        place = difference.argmax()
        worst = max(worst, (float(difference[place]), float(generated[place]), float(trained[place])))
    sums.reduce(engine.processes)
    mean, dtype = sums.means().get(LOGP_DIFF, 0.0), engine.model.dtype
    if mean <= LIMITS[dtype]:
        return Agreement(sums)
    most, generated_logp, trained_logp = max(engine.processes.gather(worst))
    problem = (
        "generation gives the sampled tokens other log-probabilities than training: they differ by "
        f"{mean:.2g} nats on average and {most:.2g} at most ({generated_logp:.2f} against {trained_logp:.2f}), and "
        f"{LIMITS[dtype]:g} on average may be rounding in {str(dtype).removeprefix('torch.')}"
    )
    return Agreement(sums, problem)


def what_to_do(batch_size: str) -> str:
    """The end of a sentence about it; `batch_size` is the field that says how many prompts are answered together."""
    return (
        f"write {batch_size}: 1 if the model is wrong where rows are padded together, or try "
        "model.attn_implementation: eager, or model.dtype: float32"
    )
