"""Readers of the golden files of the methods that AlignDistil is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case import Case, Content, about_tokens, batch_of, floats, interleaved, pair_batch
from torch import Tensor

from aligndistil.batch import Batch, DataKind
from aligndistil.objectives.bandit import Bandit
from aligndistil.objectives.base import Role
from aligndistil.objectives.kto import KTO
from aligndistil.objectives.reinforce import Reinforce
from aligndistil.objectives.sft import SFT
from aligndistil.objectives.simpo import SimPO
from aligndistil.objectives.tdpo import TDPO


def read_sft(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    batch = batch_of(DataKind.RESPONSES, *(torch.tensor(inputs[key]) for key in ("ids", "attn", "prompt_lens")))
    for key, expected in content["expected"].items():
        yield Case(
            key,
            SFT(),
            batch,
            {Role.POLICY: floats(inputs["student_logits"])},
            list(range(batch.rows)),
            loss=expected["loss"],
            gradient=floats(expected["grad_student"]),
            per_example=floats(expected["per_response_loss"]),
            metrics={"logps/token_mean": -expected["loss"]},
        )


def read_simpo(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    pairs = len(inputs["prompt_lens"])
    logits, order = {Role.POLICY: floats(inputs["student_logits"])}, interleaved(pairs, 0, 1)
    for key, expected in content["expected"].items():
        beta, mean_logps = expected["beta"], floats(expected["avg_logps"])
        margins = {
            "ratio": {"gamma_beta_ratio": expected["gamma_beta_ratio"]},
            "gamma": {"simpo_gamma": expected["gamma"]},
        }
        for name, margin in margins.items():
            yield Case(
                f"{key}-given-{name}",
                SimPO(beta=beta, **margin),
                pair_batch(inputs),
                logits,
                order,
                loss=expected["loss"],
                gradient=floats(expected["grad_student"]),
                per_example=floats(expected["per_pair_loss"]),
                metrics={
                    "rewards/chosen": float(floats(expected["chosen_rewards"]).mean()),
                    "rewards/rejected": float(floats(expected["rejected_rewards"]).mean()),
                    "rewards/margins_above_gamma": float(
                        (beta * (mean_logps[:pairs] - mean_logps[pairs:])).mean() - expected["gamma"]
                    ),
                    "logps/chosen_token_mean": float(mean_logps[:pairs].mean()),
                    "logps/rejected_token_mean": float(mean_logps[pairs:].mean()),
                },
            )


def read_tdpo(content: Content) -> Iterator[Case]:
    inputs = content["inputs"]
    logits = {
        Role.POLICY: floats(inputs["student_logits"]),
        Role.REFERENCE: floats(inputs["reference_logits"]),
    }
    pairs = len(inputs["prompt_lens"])
    order = interleaved(pairs, 0, 1)
    for key, expected in content["expected"].items():
        beta = expected["beta"]
        version = {"version": 1} if key == "tdpo1" else {"version": 2, "alpha": expected["alpha"]}
        kl, logratio = floats(expected["seq_forward_kl"]), floats(expected["logps_margin"])
        yield Case(
            key,
            TDPO(beta=beta, **version),
            pair_batch(inputs),
            logits,
            order,
            loss=expected["loss"],
            gradient=floats(expected["grad_student"]),
            per_example=floats(expected["per_pair_loss"]),
            per_row={"kl": kl[order]},
            metrics={
                "rewards/chosen": beta * float(logratio[:pairs].mean()),
                "rewards/rejected": beta * float(logratio[pairs:].mean()),
                "rewards/chosen_with_kl": float(floats(expected["chosen_rewards"]).mean()),
                "rewards/rejected_with_kl": float(floats(expected["rejected_rewards"]).mean()),
                "kl/chosen": float(kl[:pairs].mean()),
                "kl/rejected": float(kl[pairs:].mean()),
                "kl/margin": float((kl[:pairs] - kl[pairs:]).mean()),
            },
            faults={"authors_trainer_as_is": expected["authors_trainer_as_is"]["loss_f32"]},
        )


def read_kto(content: Content) -> Iterator[Case]:
    """Logits of the rows, and then of each prompt with the response of the next row."""
    inputs = content["inputs"]
    ids, prompt_lengths = torch.tensor(inputs["ids"]), torch.tensor(inputs["prompt_lens"])
    mismatched_ids, mismatched_attention = (torch.tensor(inputs[f"mismatched_{key}"]) for key in ("ids", "attn"))
    rows = len(ids)
    for key, expected in content["expected"].items():
        label = torch.tensor(expected["label"]).bool()
        reward = floats(expected["rewards"])
        logps = {"logp": floats(expected["policy_logps"]), "ref_logp": floats(expected["ref_logps"])}
        sides = {"desirable": label, "undesirable": ~label}
        yield Case(
            key,
            KTO(**{name: expected[name] for name in ("beta", "desirable_weight", "undesirable_weight")}),
            batch_of(DataKind.UNPAIRED, ids, torch.tensor(inputs["attn"]), prompt_lengths, label),
            {Role.POLICY: floats(expected["student_logits"]), Role.REFERENCE: floats(expected["reference_logits"])},
            list(range(rows)),
            loss=expected["loss"],
            gradient=floats(expected["grad_student"]),
            per_row={name: values[:rows] for name, values in logps.items()},
            metrics={
                "kl/z0": expected["kl"],
                "labels/desirable": float(label.double().mean()),
                **{f"rewards/{side}": float(reward[of].mean()) for side, of in sides.items() if of.any()},
                **{f"logps/{side}": float(logps["logp"][:rows][of].mean()) for side, of in sides.items() if of.any()},
            },
            looked_at=batch_of(DataKind.UNPAIRED, mismatched_ids, mismatched_attention, prompt_lengths),
            looked_at_order=list(range(rows, 2 * rows)),
            found={"kl/mismatched": expected["kl_unclamped"]},
        )


def _samples(inputs: Content) -> tuple[Batch, dict[str, Tensor]]:
    """Left-padded samples of a policy, with the teachers of the contrastive reward."""
    ids, response = torch.tensor(inputs["sequences"]), about_tokens(torch.tensor(inputs["position_mask"])).bool()
    batch = Batch(DataKind.RESPONSES, ids, ids != 0, response, torch.ones(len(ids), dtype=torch.bool))
    names = {Role.POLICY: "student", Role.TEACHER: "dpo", Role.REVERSE_TEACHER: "reverse"}
    return batch, {role: floats(inputs[f"{name}_logits"]) for role, name in names.items()}


def read_bandit(content: Content) -> Iterator[Case]:
    inputs, expected = content["inputs"], content["expected"]
    batch, logits = _samples(inputs)
    reward, logratio = floats(expected["R_seq"]), floats(expected["logratio"])
    for key in ("literal", "score_function"):
        yield Case(
            key,
            Bandit(beta=inputs["beta"], beta0=inputs["beta0"], literal=key == "literal"),
            batch,
            logits,
            list(range(batch.rows)),
            loss=expected[key]["loss"],
            gradient=floats(expected[key]["grad_student"]),
            per_row={"reward": reward},
            metrics={
                "reward/sequence": float(reward.mean()),
                "reward/sequence_square": float(reward.square().mean()),
                "kl/policy_teacher_sampled": float(logratio.mean()),
            },
        )


def read_reinforce(content: Content) -> Iterator[Case]:
    inputs, expected = content["inputs"], content["expected"]
    batch, logits = _samples(inputs)
    reward, kl, returns = (about_tokens(floats(expected[key])) for key in ("r_token", "kl_t", "G"))
    length = batch.response_BT.sum(-1)
    yield Case(
        "left-padded",
        Reinforce(beta=inputs["beta"], beta0=inputs["beta0"]),
        batch,
        logits,
        list(range(batch.rows)),
        loss=expected["loss"],
        gradient=floats(expected["grad_student"]),
        terms={"reward": reward, "kl_teacher": kl},
        metrics={
            "reward/token_mean": float((reward.sum(-1) / length).mean()),
            "reward/sequence": float(reward.sum(-1).mean()),
            "reward/sequence_square": float(reward.sum(-1).square().mean()),
            "returns/token_mean": float((returns.sum(-1) / length).mean()),
            "kl/policy_teacher": float(kl.sum(-1).mean()),
            "kl/policy_teacher_token": float((kl.sum(-1) / length).mean()),
        },
    )
