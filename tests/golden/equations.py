"""The losses of the golden files, written out in float64 from the papers: plain torch on whole logits, and autograd.

Nothing of the package that is tested is imported. A function takes the `inputs` of a file and the `cases` of its
`expected`, of which it reads what a case is given, and returns `expected` anew. Logits at a position speak about the
next token, so that a value of a token stands where the token is predicted; a gradient is in the policy's logits.
Pairs are stacked, all chosen responses before all rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Content = dict[str, Any]


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(values: Any) -> Tensor:
    return floats(values).requires_grad_()


def gradient(loss: Tensor, of: Tensor) -> list[Any]:
    return torch.autograd.grad(loss, of, retain_graph=True)[0].tolist()


def predicting(ids: Tensor, attention: Tensor, prompt_lengths: Tensor) -> Tensor:
    """(B, T) bool: the positions whose logits predict a token of the response, EOS included."""
    at = torch.arange(ids.shape[1])
    return attention.bool().roll(-1, 1) & (at >= prompt_lengths[:, None] - 1) & (at < ids.shape[1] - 1)


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T) log-probability of the next token."""
    return torch.log_softmax(logits, -1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(B, T) KL(p || q), from logits."""
    p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return (p.exp() * (p - q)).sum(-1)


def stacked(inputs: Content) -> tuple[Tensor, Tensor]:
    """Ids and predicting positions of pairs."""
    ids, attention = (torch.tensor(inputs[f"chosen_{key}"] + inputs[f"rejected_{key}"]) for key in ("ids", "attn"))
    return ids, predicting(ids, attention, torch.tensor(inputs["prompt_lens"] * 2))


def dpo(inputs: Content, cases: Content) -> Content:
    """Equation 7 of Rafailov et al. 2023; the reverse one prefers the rejected responses."""
    ids, where = stacked(inputs)
    z, found, pairs = leaf(inputs["student_logits"]), {}, len(ids) // 2
    logp, ref_logp = ((token_logps(x, ids) * where).sum(-1) for x in (z, floats(inputs["reference_logits"])))
    for key in cases:
        reward = float(key.removeprefix("beta=")) * (logp - ref_logp)
        margin = reward[:pairs] - reward[pairs:]
        losses, reverse = -F.logsigmoid(margin), -F.logsigmoid(-margin).mean()
        found[key] = {
            "loss": losses.mean().item(),
            "per_pair_loss": losses.tolist(),
            "policy_logps": logp.tolist(),
            "ref_logps": ref_logp.tolist(),
            "chosen_rewards": reward[:pairs].tolist(),
            "rejected_rewards": reward[pairs:].tolist(),
            "reward_accuracy": (margin > 0).double().mean().item(),
            "grad_student": gradient(losses.mean(), z),
            "reverse_dpo_loss": reverse.item(),
            "reverse_dpo_grad": gradient(reverse, z),
        }
    return found


def sft(inputs: Content, cases: Content) -> Content:
    """Minus the mean log-likelihood of each response, averaged over responses."""
    ids, attention, prompts = (torch.tensor(inputs[key]) for key in ("ids", "attn", "prompt_lens"))
    z, where = leaf(inputs["student_logits"]), predicting(ids, attention, prompts)
    targets = ids.roll(-1, 1).masked_fill(~where, -100)
    losses = torch.stack([F.cross_entropy(row, target) for row, target in zip(z, targets, strict=True)])
    found = {"loss": losses.mean().item(), "per_response_loss": losses.tolist()}
    return {key: {**found, "grad_student": gradient(losses.mean(), z)} for key in cases}


def simpo(inputs: Content, cases: Content) -> Content:
    """Equation 6 of Meng et al. 2024, with gamma = ratio x beta."""
    ids, where = stacked(inputs)
    z, found, pairs = leaf(inputs["student_logits"]), {}, len(ids) // 2
    mean_logp = (token_logps(z, ids) * where).sum(-1) / where.sum(-1)
    for key, case in cases.items():
        beta, ratio = case["beta"], case["gamma_beta_ratio"]
        losses = -F.logsigmoid(beta * (mean_logp[:pairs] - mean_logp[pairs:] - ratio))
        found[key] = {
            "beta": beta,
            "gamma_beta_ratio": ratio,
            "gamma": ratio * beta,
            "loss": losses.mean().item(),
            "per_pair_loss": losses.tolist(),
            "avg_logps": mean_logp.tolist(),
            "chosen_rewards": (beta * mean_logp[:pairs]).tolist(),
            "rejected_rewards": (beta * mean_logp[pairs:]).tolist(),
            "grad_student": gradient(losses.mean(), z),
        }
    return found


def tdpo(inputs: Content, cases: Content) -> Content:
    """Equations 16 (TDPO1) and 18 (TDPO2) of Zeng et al. 2024, and a trainer that got both wrong.

    That trainer takes alpha = 0 for TDPO1 and 1 for TDPO2, and the divergences one position late.
    """
    ids, where = stacked(inputs)
    z, reference, found, pairs = leaf(inputs["student_logits"]), floats(inputs["reference_logits"]), {}, len(ids) // 2
    ratio = ((token_logps(z, ids) - token_logps(reference, ids)) * where).sum(-1)
    kl_at = divergence(reference, z)
    kl, late = ((values * where).sum(-1) for values in (kl_at, kl_at.roll(-1, 1)))
    for key, case in cases.items():
        beta, alpha = case["beta"], case["alpha"]
        margin = ratio[:pairs] - ratio[pairs:]
        of_kl = kl[:pairs] - kl[pairs:] if key == "tdpo1" else alpha * (kl[:pairs].detach() - kl[pairs:])
        of_late = (key != "tdpo1") * (late[:pairs].detach() - late[pairs:])
        losses, wrong = (-F.logsigmoid(beta * (margin + of)) for of in (of_kl, of_late))
        reward = beta * (ratio + kl)
        found[key] = {
            "beta": beta,
            "alpha": alpha,
            "loss": losses.mean().item(),
            "per_pair_loss": losses.tolist(),
            "logps_margin": ratio.tolist(),
            "seq_forward_kl": kl.tolist(),
            "chosen_rewards": reward[:pairs].tolist(),
            "rejected_rewards": reward[pairs:].tolist(),
            "grad_student": gradient(losses.mean(), z),
            "authors_trainer_as_is": {"loss_f32": wrong.mean().item()},
        }
    return found


def kto(inputs: Content, cases: Content) -> Content:
    """Equation 8 of Ethayarajh et al. 2024, lambda - v; rows of prompts with other responses follow the examples."""
    ids, attention = (torch.tensor(inputs[key] + inputs[f"mismatched_{key}"]) for key in ("ids", "attn"))
    where, rows = predicting(ids, attention, torch.tensor(inputs["prompt_lens"] * 2)), len(ids) // 2
    found = {}
    for key, case in cases.items():
        z, desirable, beta = leaf(case["student_logits"]), torch.tensor(case["label"]).bool(), case["beta"]
        logp, ref_logp = ((token_logps(x, ids) * where).sum(-1) for x in (z, floats(case["reference_logits"])))
        mean_kl = (logp - ref_logp)[rows:].mean().detach()
        gain = beta * ((logp - ref_logp)[:rows] - mean_kl.clamp(min=0))
        desirable_cost = case["desirable_weight"] * (1 - torch.sigmoid(gain))
        undesirable_cost = case["undesirable_weight"] * (1 - torch.sigmoid(-gain))
        loss = torch.where(desirable, desirable_cost, undesirable_cost).mean()
        given = ("label", "beta", "desirable_weight", "undesirable_weight", "student_logits", "reference_logits")
        found[key] = {
            **{name: case[name] for name in given},
            "policy_logps": logp.tolist(),
            "ref_logps": ref_logp.tolist(),
            "kl_unclamped": mean_kl.item(),
            "kl": mean_kl.clamp(min=0).item(),
            "loss": loss.item(),
            "grad_student": gradient(loss, z),
            "rewards": (beta * (logp - ref_logp)[:rows]).tolist(),
        }
    return found


def distilled(
    models: tuple[Tensor, Tensor, Tensor], where: Tensor, variant: str, beta0: float, constants: Content, eps: float
) -> dict[str, Tensor]:
    """Equations 11, 14 to 19 of Zhang et al. 2025 (AlignDistil), from logits of policy, DPO and other model.

    `constants` holds `beta` of the constant weight (theorem1, theorem1_contrast) or `r` of the adaptive one.
    """
    z, dpo_z, other = models
    if "beta" in constants:
        beta = torch.full(z.shape[:-1], constants["beta"], dtype=z.dtype)
        alpha = beta0 / beta
    else:
        tvd = (torch.softmax(dpo_z, -1) - torch.softmax(other, -1)).abs().sum(-1) / 2
        alpha = constants["r"] * tvd + eps
        beta = beta0 / alpha
    contrastive = variant in ("aligndistil", "theorem1_contrast")
    target = (dpo_z if contrastive else other) + alpha[..., None] * (dpo_z - other)
    kl = divergence(z, target)
    values = {"alpha": alpha, "beta_t": beta, "kl_t": kl, "kl_to_dpo_t": divergence(z, dpo_z), "weighted": beta * kl}
    return {name: value * where for name, value in values.items()}


def distillation(z: Tensor, values: dict[str, Tensor], where: Tensor, constants: Content) -> Content:
    loss = (values["weighted"].sum(-1) / where.sum(-1)).mean()
    detail = {name: value.tolist() for name, value in values.items() if name != "weighted"}
    return {**constants, "loss": loss.item(), "grad_student": gradient(loss, z), "detail": detail}


def aligndistil_offpolicy(inputs: Content, cases: Content) -> Content:
    """Equation 19; as the authors' code has it, in float32, where its positions are right and one token late.

    That code leaves the factor 1/2 out of the distance, so that its r counts half.
    """
    z, dpo_z = leaf(inputs["student_logits"]), floats(inputs["dpo_logits"])
    where = torch.tensor(inputs["position_mask"])
    found = {}
    for key, case in cases.items():
        other = floats(case.get("reverse_logits", inputs["reverse_or_ref_logits"]))
        fixed = case["variant"], case["beta0"]
        given = {name: case[name] for name in ("variant", "beta0", "authors_beta2", "reverse_logits") if name in case}
        entry = {}
        for name in ("paper_equiv", "paper_literal_r_eq_beta2"):
            if name in case:
                constants = {of: case[name][of] for of in ("r", "beta") if of in case[name]}
                values = distilled((z, dpo_z, other), where, *fixed, constants, inputs["eps"])
                entry[name] = distillation(z, values, where, constants)
        constants = {of: case["paper_equiv"][of] for of in ("r", "beta") if of in case["paper_equiv"]}
        if "note" in case["paper_equiv"]:
            entry["paper_equiv"]["note"] = case["paper_equiv"]["note"]
        for name, late in (("authors_aligned_f32", 0), ("authors_as_is_misaligned_f32", 1)):
            if name in case:
                single = z.detach().float(), dpo_z.float(), other.float()
                values = distilled(single, where.roll(late, 1), *fixed, constants, inputs["eps"])
                entry[name] = {"loss": [(values["weighted"].sum(-1) / where.sum(-1)).mean().item()]}
        found[key] = given | entry
    return found


def aligndistil_onpolicy(inputs: Content, expected: Content) -> Content:
    """Equation 18 on left-padded samples, its metrics, and the authors' code on its own positions, in float32."""
    z, dpo_z, reverse = (leaf(inputs[f"{name}_logits"]) for name in ("student", "dpo", "reverse"))
    ids, where = torch.tensor(inputs["sequences"]), torch.tensor(inputs["right_position_mask"])
    fixed = "aligndistil", inputs["beta0"], {"r": expected["paper_equiv"]["r"]}, inputs["eps"]
    models = z, dpo_z.detach(), reverse.detach()
    values = distilled(models, where, *fixed)
    theirs = torch.tensor(inputs["authors_position_mask"])
    single = distilled((z.detach().float(), models[1].float(), models[2].float()), theirs, *fixed)
    reward = inputs["beta0"] * (token_logps(models[1], ids) - token_logps(models[2], ids)) * where
    length = where.sum(-1)
    sums = {"reward": reward.sum(-1), "kl_to_dpo": values["kl_to_dpo_t"].sum(-1), "alpha": values["alpha"].sum(-1)}
    means = {name: (total / length).mean().item() for name, total in sums.items()}
    return {
        "paper_equiv": distillation(z, values, where, fixed[2]),
        "authors_as_is_f32": {"loss": [(single["weighted"].sum(-1) / theirs.sum(-1)).mean().item()]},
        "metrics": {
            "token_averaged_reward": means["reward"],
            "seq_reward": sums["reward"].mean().item(),
            "seq_kl_to_dpo": sums["kl_to_dpo"].mean().item(),
            "token_kl_to_dpo": means["kl_to_dpo"],
            "mean_alpha": means["alpha"],
            "response_length": length.double().mean().item(),
        },
    }


def metrics_pairs(inputs: Content, _: Content) -> Content:
    """The rewards of equations 5 and 12 of Zhang et al. 2025, and how often they rank a pair right (Table 2)."""
    ids, where = stacked(inputs)
    found, pairs = {}, len(ids) // 2
    dpo_logp = token_logps(floats(inputs["dpo_logits"]), ids)
    for kind, other in (("vanilla", "init_logits"), ("contrastive", "reverse_logits")):
        reward = (inputs["beta0"] * (dpo_logp - token_logps(floats(inputs[other]), ids)) * where).sum(-1)
        found[f"{kind}_reward"] = reward.tolist()
        found[f"{kind}_accuracy"] = (reward[:pairs] > reward[pairs:]).double().mean().item()
        found[f"{kind}_token_averaged"] = (reward / where.sum(-1)).tolist()
    return found


def samples(inputs: Content) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The policy's logits; log-probabilities of policy and DPO model, rewards (B, T), positions."""
    ids, where = torch.tensor(inputs["sequences"]), torch.tensor(inputs["position_mask"])
    z = leaf(inputs["student_logits"])
    logp, dpo_logp, reverse_logp = (
        token_logps(x, ids) * where for x in (z, floats(inputs["dpo_logits"]), floats(inputs["reverse_logits"]))
    )
    return z, logp, dpo_logp, inputs["beta0"] * (dpo_logp - reverse_logp), where


def eq42_bandit(inputs: Content, _: Content) -> Content:
    """Equation 42 of Zhang et al. 2025, as printed and as its footnote 2 means it."""
    z, logp, dpo_logp, reward, where = samples(inputs)
    total, ratio, length = reward.sum(-1), (logp - dpo_logp).sum(-1), where.sum(-1)
    losses = {
        "literal": -((total * logp.sum(-1) - inputs["beta"] * ratio) / length).mean(),
        "score_function": -((total - inputs["beta"] * ratio).detach() * logp.sum(-1) / length).mean(),
    }
    entries = {key: {"loss": loss.item(), "grad_student": gradient(loss, z)} for key, loss in losses.items()}
    return {"R_seq": total.tolist(), "logratio": ratio.tolist(), **entries}


def eq43_reinforce(inputs: Content, _: Content) -> Content:
    """Equation 43 of Zhang et al. 2025: rewards to go, and an exact KL with gradient."""
    z, logp, _, reward, where = samples(inputs)
    to_go = torch.stack([reward[:, t:].sum(-1) for t in range(reward.shape[1])], -1) * where
    kl = divergence(z, floats(inputs["dpo_logits"])) * where
    loss = -((to_go * logp - inputs["beta"] * kl).sum(-1) / where.sum(-1)).mean()
    values = {"r_token": reward, "G": to_go, "kl_t": kl}
    return {**{name: v.tolist() for name, v in values.items()}, "loss": loss.item(), "grad_student": gradient(loss, z)}


def reward_model(inputs: Content, _: Content) -> Content:
    """Equation 1 of Ouyang et al. 2022, for pairs."""
    chosen, rejected = leaf(inputs["chosen_reward"]), leaf(inputs["rejected_reward"])
    loss = -F.logsigmoid(chosen - rejected).mean()
    gradients = {"grad_chosen": gradient(loss, chosen), "grad_rejected": gradient(loss, rejected)}
    return {"loss": loss.item(), **gradients, "accuracy": (chosen > rejected).double().mean().item()}


def backwards(step: Callable[[Tensor, int], Tensor], like: Tensor) -> Tensor:
    """(B, T) what `step` makes of the result of the next token, from the last token to the first."""
    later, found = torch.zeros(len(like), dtype=like.dtype), []
    for t in reversed(range(like.shape[1])):
        later = step(later, t)
        found.insert(0, later)
    return torch.stack(found, 1)


def judged(reward: Tensor, inputs: Content, where: Tensor) -> dict[str, Tensor]:
    """Equation 16 of Schulman et al. 2015, the returns, and the advantages with mean 0 and biased variance 1."""
    gamma, lam, value = inputs["gamma"], inputs["lambd"], floats(inputs["values"]) * where
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    error = (reward + gamma * after - value) * where
    advantage = backwards(lambda later, t: error[:, t] + gamma * lam * later, error) * where
    tokens = advantage[where.bool()]
    white = (advantage - tokens.mean()) / tokens.var(correction=0).clamp(min=1e-8).sqrt() * where
    return {"advantages": advantage, "returns": advantage + value, "whitened": white}


def at_last(score: Any, where: Tensor) -> Tensor:
    """(B, T) the scores (B,) at the last tokens."""
    last = where.sum(-1).long() - 1
    return torch.zeros_like(where).scatter(1, last[:, None], floats(score)[:, None])


def ppo(inputs: Content, _: Content) -> Content:
    """Section 2.2 of Ziegler et al. 2019, equation 7 of Schulman et al. 2017, and the clipped error of its code."""
    where, low, high = floats(inputs["action_mask"]), *inputs["reward_clip"]
    old, base, old_value = (floats(inputs[key]) for key in ("old_logp", "base_logp", "values"))
    logp, value = leaf(inputs["new_logp"]), leaf(inputs["new_values"])
    k1 = (old - base) * where
    reward = -inputs["kl_coef"] * k1 + at_last(inputs["rm_score"], where).clamp(low, high)
    rollout = judged(reward, inputs, where)
    advantage, target = rollout["whitened"], rollout["returns"]
    ratio, clip = (logp - old).exp(), inputs["clip"]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    policy_loss = -((gain * where).sum(-1) / where.sum(-1)).mean()
    near = old_value + (value - old_value).clamp(-inputs["value_clip"], inputs["value_clip"])
    errors = {
        "value_loss": torch.maximum((value - target) ** 2, (near - target) ** 2),
        "value_loss_noclip": (value - target) ** 2,
    }
    losses = {name: ((error * where).sum(-1) / where.sum(-1)).mean() / 2 for name, error in errors.items()}
    return {
        "kl_k1": k1.tolist(),
        "kl_k3": ((-k1).exp() - 1 + k1).tolist(),
        "token_reward": reward.tolist(),
        "advantages": rollout["advantages"].tolist(),
        "returns": target.tolist(),
        "whitened_advantages": advantage.tolist(),
        "policy_loss": policy_loss.item(),
        "grad_new_logp": gradient(policy_loss, logp),
        **{name: loss.item() for name, loss in losses.items()},
        "grad_new_values": gradient(losses["value_loss"], value),
        "reinforce_returns_gamma1": backwards(lambda later, t: reward[:, t] + later, reward).tolist(),
        "reinforce_returns_gamma0_9": backwards(lambda later, t: reward[:, t] + 0.9 * later, reward).tolist(),
    }


def rto(inputs: Content, cases: Content) -> Content:
    """Algorithm 2 of Zhong et al. 2024; its later version (`beta3`) adds a score, which its code cuts to 10."""
    where, found = floats(inputs["action_mask"]), {}
    logp, ref_logp, dpo_logp = (floats(inputs[key]) for key in ("policy_logp", "ref_logp", "dpo_logp"))
    for key, case in cases.items():
        given = {name: case[name] for name in ("beta1", "clip", "beta2_kl", "beta3") if name in case}
        of_dpo, limit = case["beta1"] * (dpo_logp - ref_logp), case.get("clip")
        of_dpo = (of_dpo.clamp(-limit, limit) if limit else of_dpo) * where
        of_kl = case["beta2_kl"] * (logp - ref_logp) * where
        score = case.get("beta3", 0.0) * at_last(inputs["rm_score"], where).clamp(-10, 10)
        reward = of_dpo - of_kl + score
        values = {"token_reward": reward, **judged(reward, inputs, where)}
        found[key] = given | {name: value.tolist() for name, value in values.items()}
    return found
