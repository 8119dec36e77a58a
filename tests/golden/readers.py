"""Golden files as cases.

A reader takes the content of one file, `{provenance, inputs, expected}`, and yields its cases. To cover another
objective, add its reader to READERS under the name of its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from baseline_readers import read_bandit, read_kto, read_reinforce, read_sft, read_simpo, read_tdpo
from case import Case, Content, TermsCase, about_tokens, batch_of, floats, interleaved, pair_batch
from reward_readers import read_ppo, read_reward_model, read_rto

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Role
from aligndistil.objectives.dpo import DPO

READ_ELSEWHERE = {"theorem1"}
"""No inputs and outputs of one objective: test_theorem.py."""


def cases_of(path: Path) -> list[Case] | list[TermsCase] | None:
    """None for a file that has no reader: its objective is not part of this package, or not yet."""
    reader = READERS.get(path.stem) or TERMS_READERS.get(path.stem)
    return None if reader is None else list(reader(json.loads(path.read_text(encoding="utf-8"))))


def read_dpo(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    logits = {
        Role.POLICY: floats(inputs["student_logits"]),
        Role.REFERENCE: floats(inputs["reference_logits"]),
    }
    pairs = len(inputs["prompt_lens"])
    straight, reverse = interleaved(pairs, 0, 1), interleaved(pairs, 1, 0)
    for key, expected in content["expected"].items():
        objective = DPO(beta=float(key.removeprefix("beta=")))
        rows = {"logp": floats(expected["policy_logps"]), "ref_logp": floats(expected["ref_logps"])}
        yield Case(
            key,
            objective,
            pair_batch(inputs),
            logits,
            straight,
            loss=expected["loss"],
            gradient=floats(expected["grad_student"]),
            per_example=floats(expected["per_pair_loss"]),
            per_row={name: values[straight] for name, values in rows.items()},
            metrics={
                "rewards/chosen": float(floats(expected["chosen_rewards"]).mean()),
                "rewards/rejected": float(floats(expected["rejected_rewards"]).mean()),
                "rewards/accuracies": expected["reward_accuracy"],
            },
        )
        yield Case(
            f"{key}-reverse",
            objective,
            pair_batch(inputs, "rejected", "chosen"),
            logits,
            reverse,
            loss=expected["reverse_dpo_loss"],
            gradient=floats(expected["reverse_dpo_grad"]),
        )


def read_aligndistil_offpolicy(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    ids, attention = torch.tensor(inputs["ids"]), torch.tensor(inputs["attn"])
    batch = batch_of(DataKind.RESPONSES, ids, attention, torch.tensor(inputs["prompt_lens"]))
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
            Role.POLICY: floats(inputs["student_logits"]),
            Role.TEACHER: floats(inputs["dpo_logits"]),
            other_role: floats(other),
        },
        list(range(batch.rows)),
        loss=numbers["loss"],
        gradient=floats(numbers["grad_student"]),
        terms={term: about_tokens(floats(numbers["detail"][key])) for term, key in detail.items()},
        float32={} if aligned is None else {"authors_aligned_f32": aligned["loss"][0]},
        faults=faults,
    )


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
    order = interleaved(pairs, 0, 1)
    for kind, other in (("vanilla", "init_logits"), ("contrastive", "reverse_logits")):
        reward = floats(expected[f"{kind}_reward"])
        logits = {Role.POLICY: floats(inputs["dpo_logits"]), Role.REFERENCE: floats(inputs[other])}
        metrics = {
            "rewards/chosen": float(reward[:pairs].mean()),
            "rewards/rejected": float(reward[pairs:].mean()),
            "rewards/accuracies": expected[f"{kind}_accuracy"],
        }
        yield Case(f"dpo-{kind}", DPO(beta=inputs["beta0"]), pair_batch(inputs), logits, order, metrics=metrics)
        objective = AlignDistil(reward=kind, beta0=inputs["beta0"])
        other_role = Role.REVERSE_TEACHER if kind == "contrastive" else Role.REFERENCE
        dpo = logits[Role.POLICY]
        yield Case(
            f"aligndistil-{kind}",
            objective,
            pair_batch(inputs),
            {Role.POLICY: dpo, Role.TEACHER: dpo, other_role: logits[Role.REFERENCE]},
            order,
            per_row={"reward": reward[order]},
            metrics={
                "reward/sequence": float(reward.mean()),
                "reward/token_mean": float(floats(expected[f"{kind}_token_averaged"]).mean()),
                "kl/policy_teacher": 0.0,
            },
        )


READERS: dict[str, Callable[[Content], Iterator[Case]]] = {
    "dpo": read_dpo,
    "aligndistil_offpolicy": read_aligndistil_offpolicy,
    "aligndistil_onpolicy": read_aligndistil_onpolicy,
    "metrics_pairs": read_metrics_pairs,
    "kto": read_kto,
    "sft": read_sft,
    "simpo": read_simpo,
    "tdpo": read_tdpo,
    "eq42_bandit": read_bandit,
    "eq43_reinforce": read_reinforce,
}

TERMS_READERS: dict[str, Callable[[Content], Iterator[TermsCase]]] = {
    "ppo": read_ppo,
    "reward_model": read_reward_model,
    "rto": read_rto,
}
