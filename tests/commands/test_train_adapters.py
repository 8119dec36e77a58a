"""A recipe with `model.lora`, from its first stage to a merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aligndistil.commands.train import run_recipe
from aligndistil.recipe import load_recipe
from support.recipes import merged, three_stages

ModelFolder = Callable[..., str]
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
IDS = torch.tensor([[5, 9, 33, 60, 7, 20, 1]])


def content(model: str, data: str, /, **sections: Any) -> dict[str, Any]:
    shared = {"model": {"lora": LORA}, "evaluation": {"kl_initial": True}, "train": {"learning_rate": 0.01}}
    return three_stages(model, data, **merged(shared, sections))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("zero", [0, 3])
def test_three_adapters_on_one_base_from_dpo_to_a_merged_model(
    zero: int,
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    recipe_file: Callable[..., Path],
    command_line: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    base = model_folder(seed=0)
    recipe = recipe_file(content(base, pairs_file(10), engine={"zero_stage": zero}))
    code, out, _ = command_line("train", str(recipe), "--dry-run")
    assert code == 0
    assert "teacher: the adapter of stage:dpo on the same base" in out
    code, out, err = command_line("train", str(recipe))
    assert code == 0, err
    for line in ("reference: the base without an adapter", "teacher: the adapter of stage:dpo on the same base"):
        assert line in out
    final = tmp_path / "runs" / "toy" / "policy" / "final"
    assert "reverse teacher" in (final / "README.md").read_text()
    assert not (final / "model.safetensors").exists()
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    divergences = [line["kl_initial"] for line in lines if "kl_initial" in line]
    assert divergences[0] == pytest.approx(0.0, abs=1e-5)
    assert divergences[-1] > 1e-4

    code, out, _ = command_line("train", str(recipe))
    assert (code, out.count("finished and unchanged, skipped")) == (0, 3)
    code, out, _ = command_line("merge", str(final), "--out", "whole")
    assert code == 0
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32))
    theirs = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), final))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
    for arguments, said in (
        (("merge", str(final), "--out", "whole"), "is there already"),
        (("merge", "whole", "--out", "other"), "is no adapter folder"),
        (("merge", "nowhere", "--out", "other"), "does not exist"),
    ):
        code, _, err = command_line(*arguments)
        assert (code, said in err) == (2, True), err


def test_an_adapter_is_trained_further_against_a_frozen_copy_of_itself(
    model_folder: ModelFolder, pairs_file: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    base, data = model_folder(seed=0), pairs_file(10)
    recipe = content(base, data, model={"lora": {"dropout": 0.0}}, evaluation={"samples": 0, "kl_initial": False})
    sft = {"objective": {"name": "sft"}}
    dpo = {"objective": {"name": "dpo"}, "model": {"path": "stage:sft"}, "models": {"reference": "stage:sft"}}
    recipe["stages"] = {"sft": sft, "dpo": dpo}
    finished = run_recipe(load_recipe(recipe_file(recipe)))
    metrics = [json.loads(x) for x in (finished.run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in metrics if line["step"] == 0)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    config = json.loads((finished.models["dpo"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    card = (finished.models["dpo"] / "README.md").read_text()
    assert "the adapter of stage:sft on the same base" in card


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"lora": {"target_modules": ["q_pro"]}}}, "model.lora.target_modules: no layer is called `q_pro`"),
        ({"stages": {"policy": {"model": {"path": "stage:dpo", "lora": {"r": 8}}}}}, "which has r: 4 and not 8"),
    ],
)
def test_a_recipe_whose_adapters_cannot_be_is_refused_with_its_place(
    sections: dict[str, Any],
    said: str,
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    recipe_file: Callable[..., Path],
    command_line: Callable[..., tuple[int, str, str]],
) -> None:
    recipe = recipe_file(content(model_folder(seed=0), pairs_file(10), **sections))
    code, _, err = command_line("train", str(recipe))
    assert code == 2
    assert said in err
    assert "toy.yaml:" in err


def test_teachers_that_are_adapters_are_cached(
    model_folder: ModelFolder, pairs_file: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    recipe = content(model_folder(seed=0), pairs_file(10))
    del recipe["stages"]["policy"]["rollout"]
    losses = []
    for cache in (False, True):
        recipe["name"], recipe["stages"]["policy"]["engine"] = f"cached-{cache}", {"teacher_cache": cache}
        recipe["model"]["lora"]["dropout"] = 0.0
        finished = run_recipe(load_recipe(recipe_file(recipe)))
        metrics = (finished.run / "policy" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics if "loss" in json.loads(line)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
