"""Models that pad their matrices beyond the tokenizer train, sample and compare as if they did not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.models import build_model, build_tokenizer
from support.recipes import on_policy
from support.run_folders import lines

TOKENS, ROWS = 96, 160


def padded_and_cut(folder: Path, seed: int) -> tuple[str, str]:
    """A model whose padding rows are likelier than its tokens, and the same without them."""
    wide = build_model(seed=seed, vocab=ROWS, tied=False)
    with torch.no_grad():
        wide.lm_head.weight[TOKENS:] *= 3
    narrow = build_model(seed=seed, vocab=TOKENS, tied=False)
    narrow.load_state_dict(
        {name: value[:TOKENS] if len(value) == ROWS else value for name, value in wide.state_dict().items()}
    )
    for name, model in (("padded", wide), ("cut", narrow)):
        model.save_pretrained(folder / name / str(seed))
        build_tokenizer().save_pretrained(folder / name / str(seed))
    return str(folder / "padded" / str(seed)), str(folder / "cut" / str(seed))


@pytest.mark.parametrize(
    "objective", [{"name": "aligndistil", "r": 5}, {"name": "reinforce", "r": None}], ids=["exact", "sampled"]
)
def test_padding_changes_nothing_that_is_learnt_measured_or_exported(
    objective: dict[str, Any],
    tmp_path: Path,
    pairs_file: Callable[..., str],
    recipe_file: Callable[..., Path],
    command_line: Callable[..., Any],
) -> None:
    data, found = pairs_file(8), []
    both = list(zip(*(padded_and_cut(tmp_path, seed) for seed in range(3)), strict=True))
    for name, (model, teacher, other) in zip(("padded", "cut"), both, strict=True):
        content = on_policy(model, teacher, other, data, objective=objective, train={"max_steps": 3}, name=name)
        recipe = recipe_file(content, f"{name}.yaml")
        code, _, err = command_line("train", recipe)
        assert code == 0, err
        (stage,) = (path.parent for path in (recipe.parent / "runs" / name).glob("*/done.json"))
        measured = [
            {key: value for key, value in line.items() if key != "split" and "logp_diff" not in key}
            for line in lines(stage)
            if line["split"] == "train"
        ]
        samples = [path.read_text() for path in sorted((stage / "samples").glob("*.jsonl"))]
        found.append((measured, samples, load_file(stage / "final/model.safetensors")))
    (padded, padded_samples, wide), (cut, cut_samples, narrow) = found
    assert padded_samples == cut_samples
    for ours, theirs in zip(padded, cut, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    published = AutoModelForCausalLM.from_pretrained(both[0][0]).state_dict()
    assert {len(wide[name]) for name in ("lm_head.weight", "model.embed_tokens.weight")} == {ROWS}
    for name, value in wide.items():
        if len(value) == ROWS:
            assert torch.equal(value[TOKENS:], published[name][TOKENS:])
        torch.testing.assert_close(value[:TOKENS] if len(value) == ROWS else value, narrow[name], atol=2e-5, rtol=0)
        assert not torch.equal(value, published[name])
