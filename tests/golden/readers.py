"""Golden files as cases: what an objective is given, and what must come out.

A reader takes the content of one file, `{provenance, inputs, expected}`, and yields its cases. To cover another
objective, add its reader to READERS under the name of its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Objective, Role
from aligndistil.objectives.dpo import DPO

FOLDER = Path(os.environ.get("ALIGNDISTIL_GOLDEN_DIR") or Path(__file__).parent / "cases")
Content = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Rows of `logits` are in the order of the file; `order` picks the rows of the batch out of them."""

    name: str
    objective: Objective
    batch: Batch
    logits: dict[Role, Tensor]
    order: list[int]
    loss: float | None = None
    gradient: Tensor | None = None
    """In the policy's logits, rows as in the file."""
    per_example: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    """(B, T), about the token at their position."""
    per_row: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the response of these terms, (B,)."""
    metrics: dict[str, float] = field(default_factory=dict)
    float32: dict[str, float] = field(default_factory=dict)
    """Losses of code that computes in float32, on aligned positions."""
    faults: dict[str, float] = field(default_factory=dict)
    """Losses of code with a known fault."""


def cases_of(path: Path) -> list[Case] | None:
    """None for a file that has no reader: its objective is not part of this package, or not yet."""
    reader = READERS.get(path.stem)
    return None if reader is None else list(reader(json.loads(path.read_text(encoding="utf-8"))))


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _pairs(inputs: Content, chosen: str = "chosen", rejected: str = "rejected") -> Batch:
    """Interleaved, as this package has it; the files stack all first responses on all second ones."""
    ids = torch.tensor([inputs[f"{side}_ids"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    attention = torch.tensor([inputs[f"{side}_attn"] for side in (chosen, rejected)]).transpose(0, 1).flatten(0, 1)
    prompt_lengths = torch.tensor(inputs["prompt_lens"]).repeat_interleave(2)
    return _batch(DataKind.PAIRS, ids, attention, prompt_lengths)


def _batch(kind: DataKind, ids: Tensor, attention: Tensor, prompt_lengths: Tensor) -> Batch:
    after_prompt = torch.arange(ids.shape[1]) >= prompt_lengths[:, None]
    return Batch(kind, ids, attention.bool(), attention.bool() & after_prompt, torch.ones(len(ids), dtype=torch.bool))


def _interleaved(pairs: int, first: int, second: int) -> list[int]:
    return [row for pair in range(pairs) for row in (first * pairs + pair, second * pairs + pair)]


def read_dpo(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    logits = {
        Role.POLICY: _numbers(inputs["student_logits"]),
        Role.REFERENCE: _numbers(inputs["reference_logits"]),
    }
    pairs = len(inputs["prompt_lens"])
    straight, reverse = _interleaved(pairs, 0, 1), _interleaved(pairs, 1, 0)
    for key, expected in content["expected"].items():
        objective = DPO(beta=float(key.removeprefix("beta=")))
        rows = {"logp": _numbers(expected["policy_logps"]), "ref_logp": _numbers(expected["ref_logps"])}
        yield Case(
            key,
            objective,
            _pairs(inputs),
            logits,
            straight,
            loss=expected["loss"],
            gradient=_numbers(expected["grad_student"]),
            per_example=_numbers(expected["per_pair_loss"]),
            per_row={name: values[straight] for name, values in rows.items()},
            metrics={
                "rewards/chosen": float(_numbers(expected["chosen_rewards"]).mean()),
                "rewards/rejected": float(_numbers(expected["rejected_rewards"]).mean()),
                "rewards/accuracies": expected["reward_accuracy"],
            },
        )
        yield Case(
            f"{key}-reverse",
            objective,
            _pairs(inputs, "rejected", "chosen"),
            logits,
            reverse,
            loss=expected["reverse_dpo_loss"],
            gradient=_numbers(expected["reverse_dpo_grad"]),
        )


def read_aligndistil_offpolicy(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    ids, attention = torch.tensor(inputs["ids"]), torch.tensor(inputs["attn"])
    batch = _batch(DataKind.RESPONSES, ids, attention, torch.tensor(inputs["prompt_lens"]))
    assert torch.equal(batch.response_BT[:, 1:].long(), torch.tensor(inputs["position_mask"])[:, :-1])
    for name, expected in content["expected"].items():
        other = expected.get("reverse_logits", inputs["reverse_or_ref_logits"])
        for key in ("paper_equiv", "paper_literal_r_eq_beta2"):
            if key not in expected:
                continue
            objective = _variant(expected["variant"], expected["beta0"], inputs["eps"], expected[key])
            yield _aligndistil_case(f"{name}-{key}", objective, batch, inputs, other, expected, expected[key])


def _variant(variant: str, beta0: float, eps: float, numbers: Content) -> AlignDistil:
    """`variant` is what the authors' command line calls it."""
    reward = "contrastive" if variant in ("aligndistil", "theorem1_contrast") else "vanilla"
    if "beta" in numbers:
        return AlignDistil(reward=reward, weight="constant", beta0=beta0, beta=numbers["beta"])
    return AlignDistil(reward=reward, beta0=beta0, r=numbers["r"], eps=eps)


def _aligndistil_case(
    name: str, objective: AlignDistil, batch: Batch, inputs: Content, other: Any, expected: Content, numbers: Content
) -> Case:
    other_role = next(role for role in objective.needs if role not in (Role.POLICY, Role.TEACHER))
    detail = {"alpha": "alpha", "beta": "beta_t", "kl_target": "kl_t", "kl_teacher": "kl_to_dpo_t"}
    aligned = expected.get("authors_aligned_f32") if "note" in numbers else None
    faults = {key: value["loss"][0] for key, value in expected.items() if "as_is" in key}
    return Case(
        name,
        objective,
        batch,
        {
            Role.POLICY: _numbers(inputs["student_logits"]),
            Role.TEACHER: _numbers(inputs["dpo_logits"]),
            other_role: _numbers(other),
        },
        list(range(batch.rows)),
        loss=numbers["loss"],
        gradient=_numbers(numbers["grad_student"]),
        terms={term: _about_tokens(_numbers(numbers["detail"][key])) for term, key in detail.items()},
        float32={} if aligned is None else {"authors_aligned_f32": aligned["loss"][0]},
        faults=faults,
    )


def _about_tokens(values_BT: Tensor) -> Tensor:
    """The files keep a value at the position that predicts, we at the token that is predicted."""
    return torch.roll(values_BT, 1, dims=1)


def read_aligndistil_onpolicy(content: Content) -> Iterator[Case]:
    inputs, expected = content["inputs"], content["expected"]
    ids, attention = torch.tensor(inputs["sequences"]), torch.tensor(inputs["attention_mask"])
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, inputs["prompt_width"] :] = torch.tensor(inputs["action_mask"]).bool()
    assert torch.equal(response[:, 1:].long(), torch.tensor(inputs["right_position_mask"])[:, :-1])
    batch = Batch(DataKind.RESPONSES, ids, attention.bool(), response, torch.ones(len(ids), dtype=torch.bool))
    objective = AlignDistil(beta0=inputs["beta0"], r=expected["paper_equiv"]["r"], eps=inputs["eps"])
    case = _aligndistil_case(
        "left-padded", objective, batch, inputs, inputs["reverse_logits"], expected, expected["paper_equiv"]
    )
    names = {
        "reward/token_mean": "token_averaged_reward",
        "reward/sequence": "seq_reward",
        "kl/policy_teacher": "seq_kl_to_dpo",
        "kl/policy_teacher_token": "token_kl_to_dpo",
        "alpha/mean": "mean_alpha",
    }
    case.metrics.update({ours: expected["metrics"][theirs] for ours, theirs in names.items()})
    assert float(batch.length_B.mean()) == expected["metrics"]["response_length"]
    yield case


def read_metrics_pairs(content: Content) -> Iterator[Case]:
    """Two models as policy and reference of DPO, whose rewards are those of Table 2."""
    inputs, expected = content["inputs"], content["expected"]
    pairs = len(inputs["prompt_lens"])
    order = _interleaved(pairs, 0, 1)
    for kind, other in (("vanilla", "init_logits"), ("contrastive", "reverse_logits")):
        reward = _numbers(expected[f"{kind}_reward"])
        logits = {Role.POLICY: _numbers(inputs["dpo_logits"]), Role.REFERENCE: _numbers(inputs[other])}
        metrics = {
            "rewards/chosen": float(reward[:pairs].mean()),
            "rewards/rejected": float(reward[pairs:].mean()),
            "rewards/accuracies": expected[f"{kind}_accuracy"],
        }
        yield Case(f"dpo-{kind}", DPO(beta=inputs["beta0"]), _pairs(inputs), logits, order, metrics=metrics)
        objective = AlignDistil(reward=kind, beta0=inputs["beta0"])
        other_role = Role.REVERSE_TEACHER if kind == "contrastive" else Role.REFERENCE
        dpo = logits[Role.POLICY]
        yield Case(
            f"aligndistil-{kind}",
            objective,
            _pairs(inputs),
            {Role.POLICY: dpo, Role.TEACHER: dpo, other_role: logits[Role.REFERENCE]},
            order,
            per_row={"reward": reward[order]},
            metrics={
                "reward/sequence": float(reward.mean()),
                "reward/token_mean": float(_numbers(expected[f"{kind}_token_averaged"]).mean()),
                "kl/policy_teacher": 0.0,
            },
        )


READERS: dict[str, Callable[[Content], Iterator[Case]]] = {
    "dpo": read_dpo,
    "aligndistil_offpolicy": read_aligndistil_offpolicy,
    "aligndistil_onpolicy": read_aligndistil_onpolicy,
    "metrics_pairs": read_metrics_pairs,
}
