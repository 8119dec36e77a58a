"""Write a new folder of golden files: the cases of `cases/` with other inputs, and what the equations make of them.

    python tests/golden/make.py --seed 1 --out golden-1
    ALIGNDISTIL_GOLDEN_DIR=golden-1 pytest tests/golden

Hyperparameters and shapes are those of `cases/`; tokens, lengths, logits, scores and values are drawn anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import equations
import torch
from equations import Content, floats, predicting, token_logps
from equations_theorem import theorem1
from torch import Generator, Tensor

CASES = Path(__file__).parent / "cases"
EOS = 1
EQUATIONS: dict[str, Callable[[Content, Content], Content]] = {
    "aligndistil_offpolicy": equations.aligndistil_offpolicy,
    "aligndistil_onpolicy": equations.aligndistil_onpolicy,
    "dpo": equations.dpo,
    "eq42_bandit": equations.eq42_bandit,
    "eq43_reinforce": equations.eq43_reinforce,
    "kto": equations.kto,
    "metrics_pairs": equations.metrics_pairs,
    "ppo": equations.ppo,
    "reward_model": equations.reward_model,
    "rto": equations.rto,
    "sft": equations.sft,
    "simpo": equations.simpo,
    "tdpo": equations.tdpo,
    "theorem1": theorem1,
}


def normal(like: object, generator: Generator, scale: float = 1.0) -> Tensor:
    """Draws in the shape of nested lists."""
    return scale * torch.randn(floats(like).shape, generator=generator, dtype=torch.float64)


def unlike(count: int, low: int, high: int, generator: Generator) -> list[int]:
    """Numbers from low to high, all different while there are enough."""
    order = (torch.randperm(high - low + 1, generator=generator) + low).tolist()
    return (order * count)[:count]


def tokens(count: int, vocab: int, generator: Generator) -> list[int]:
    """Neither padding nor EOS."""
    return torch.randint(2, vocab, (count,), generator=generator).tolist()


def padded(rows: list[list[int]], width: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and attention."""
    ids = [row + [0] * (width - len(row)) for row in rows]
    return ids, [[1] * len(row) + [0] * (width - len(row)) for row in rows]


def draw_logits(inputs: Content, generator: Generator) -> None:
    for key in inputs:
        if key.endswith("_logits"):
            inputs[key] = normal(inputs[key], generator, 1.5).tolist()


def draw_pairs(content: Content, generator: Generator) -> None:
    """The two responses to a prompt are of different lengths."""
    inputs = content["inputs"]
    width, vocab = len(inputs["chosen_ids"][0]), inputs["vocab"]
    prompts = [tokens(length, vocab, generator) for length in unlike(len(inputs["prompt_lens"]), 1, 3, generator)]
    lengths = [unlike(2, 2, width - len(prompt), generator) for prompt in prompts]
    inputs["prompt_lens"] = [len(prompt) for prompt in prompts]
    for of, side in enumerate(("chosen", "rejected")):
        rows = [
            [*prompt, *tokens(n[of] - 1, vocab, generator), EOS] for prompt, n in zip(prompts, lengths, strict=True)
        ]
        inputs[f"{side}_ids"], inputs[f"{side}_attn"] = padded(rows, width)
    draw_logits(inputs, generator)


def draw_unpaired(content: Content, generator: Generator) -> None:
    """The reference point of one case is clamped, with a response above 0; in the others no response is below 0."""
    inputs = content["inputs"]
    width, vocab, count = len(inputs["ids"][0]), inputs["vocab"], len(inputs["ids"])
    prompts = [tokens(length, vocab, generator) for length in unlike(count, 1, 3, generator)]
    lengths = unlike(count, 2, width - 3, generator)
    responses = [[*tokens(length - 1, vocab, generator), EOS] for length in lengths]
    inputs["prompt_lens"] = [len(prompt) for prompt in prompts]
    for name, of in (("", responses), ("mismatched_", [*responses[1:], responses[0]])):
        rows = [prompt + response for prompt, response in zip(prompts, of, strict=True)]
        inputs[f"{name}ids"], inputs[f"{name}attn"] = padded(rows, width)
    ids, attention = (torch.tensor(inputs[f"mismatched_{key}"]) for key in ("ids", "attn"))
    where = predicting(ids, attention, torch.tensor(inputs["prompt_lens"]))
    for name, case in content["expected"].items():
        student, reference = (normal(case[f"{of}_logits"], generator, 1.5) for of in ("student", "reference"))
        ratio = ((token_logps(student[count:], ids) - token_logps(reference[count:], ids)) * where).sum(-1)
        wanted = torch.ones(count)
        if name == "kl_clamped_to_0":
            wanted = -wanted
            wanted[ratio.abs().argsort()[1]] = 1  # the second smallest, so that the mean is below 0 all the same
        # with both models exchanged a log-ratio has the other sign
        turned = torch.cat([torch.zeros(count, dtype=torch.bool), ratio.sign() != wanted])[:, None, None]
        case["student_logits"] = torch.where(turned, reference, student).tolist()
        case["reference_logits"] = torch.where(turned, student, reference).tolist()


def draw_responses(content: Content, generator: Generator) -> None:
    """One case has a reverse model that is the DPO model but for a millionth, so that alpha is all but eps."""
    inputs = content["inputs"]
    width, vocab, count = len(inputs["ids"][0]), inputs["vocab"], len(inputs["ids"])
    prompt_lengths, lengths = unlike(count, 2, 4, generator), unlike(count, 2, width - 4, generator)
    rows = [[*tokens(p + n - 1, vocab, generator), EOS] for p, n in zip(prompt_lengths, lengths, strict=True)]
    inputs["prompt_lens"] = prompt_lengths
    inputs["ids"], inputs["attn"] = padded(rows, width)
    where = predicting(*(torch.tensor(inputs[key]) for key in ("ids", "attn", "prompt_lens")))
    draw_logits(inputs, generator)
    if "position_mask" in inputs:
        inputs["position_mask"] = where.long().tolist()
    for case in content["expected"].values():
        if "reverse_logits" in case:
            close = normal(case["reverse_logits"], generator, 1e-6)
            case["reverse_logits"] = (floats(inputs["dpo_logits"]) + close).tolist()


def draw_samples(content: Content, generator: Generator) -> None:
    """Left-padded prompts. The authors' positions are one late, and end before the last column."""
    inputs = content["inputs"]
    count, columns, width = len(inputs["sequences"]), len(inputs["sequences"][0]), inputs["prompt_width"]
    most, vocab = columns - width, inputs["vocab"]
    prompt_lengths, lengths = unlike(count, 2, width, generator), unlike(count, most - count + 1, most, generator)
    rows = [
        [0] * (width - p) + tokens(p + n - 1, vocab, generator) + [EOS] + [0] * (most - n)
        for p, n in zip(prompt_lengths, lengths, strict=True)
    ]
    where = [[0] * (width - 1) + [1] * n + [0] * (most - n + 1) for n in lengths]
    drawn = {
        "sequences": rows,
        "position_mask": where,
        "right_position_mask": where,
        "authors_position_mask": [[0, *row[:-2], 0] for row in where],
        "action_mask": [[1] * n + [0] * (most - n) for n in lengths],
        "attention_mask": [[int(token != 0) for token in row] for row in rows],
    }
    inputs.update({name: values for name, values in drawn.items() if name in inputs})
    draw_logits(inputs, generator)


def draw_rollout(content: Content, generator: Generator) -> None:
    """The score of the last response is far above the clip."""
    inputs = content["inputs"]
    count, width = len(inputs["action_mask"]), len(inputs["action_mask"][0])
    lengths = [width, *unlike(count - 1, 2, width - 1, generator)]
    inputs["action_mask"] = [[1] * n + [0] * (width - n) for n in lengths]
    for key in [key for key in inputs if key.endswith("_logp")]:
        inputs[key] = (-normal(inputs[key], generator).abs()).tolist()
    inputs["values"] = normal(inputs["values"], generator).tolist()
    inputs["rm_score"] = [*normal(inputs["rm_score"][:-1], generator).tolist(), 25.0]
    for now, before in (("new_logp", "old_logp"), ("new_values", "values")):
        if now in inputs:
            inputs[now] = (floats(inputs[before]) + normal(inputs[now], generator, 0.3)).tolist()


def draw_scores(content: Content, generator: Generator) -> None:
    content["inputs"] = {key: normal(values, generator).tolist() for key, values in content["inputs"].items()}


def draw_tables(content: Content, generator: Generator) -> None:
    for tables in content["inputs"].values():
        for name, values in tables.items():
            tables[name] = torch.log_softmax(normal(values, generator), -1).tolist()


DRAW: dict[str, Callable[[Content, Generator], None]] = {
    **dict.fromkeys(("dpo", "metrics_pairs", "simpo", "tdpo"), draw_pairs),
    **dict.fromkeys(("aligndistil_onpolicy", "eq42_bandit", "eq43_reinforce"), draw_samples),
    **dict.fromkeys(("ppo", "rto"), draw_rollout),
    **dict.fromkeys(("aligndistil_offpolicy", "sft"), draw_responses),
    "kto": draw_unpaired,
    "reward_model": draw_scores,
    "theorem1": draw_tables,
}


def make(seed: int, folder: Path) -> None:
    """Raises ValueError where `folder` is that of the committed files."""
    if folder.resolve() == CASES.resolve():
        raise ValueError(f"{CASES} holds what published code computed; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for name, equation in EQUATIONS.items():
        content = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))
        DRAW[name](content, generator)
        content["provenance"] = [f"tests/golden/make.py --seed {seed}"]
        content["expected"] = equation(content["inputs"], content["expected"])
        text = json.dumps(content, separators=(",", ":")) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        make(given.seed, given.out)
    except ValueError as mistake:
        parser.error(str(mistake))
