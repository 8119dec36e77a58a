"""Models that are refused before data is read, composite ones, and rewards of other tokens: as a user meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from aligndistil.models.weights import published_tensors
from support.models import EOS, PAD, WORDS, build_model, build_tokenizer
from support.recipes import actor_critic, off_policy

ModelFolder = Callable[..., str]
CommandLine = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("place", ["model.path", "models.reference", "models.critic", "models.reward"])
@pytest.mark.parametrize("command", ["train", "validate"])
def test_tensors_without_a_place_are_refused_before_data_is_read(
    command: str,
    place: str,
    model_folder: ModelFolder,
    recipe_file: Callable[..., Path],
    command_line: CommandLine,
    tmp_path: Path,
) -> None:
    scalar = place == "models.reward"
    odd = Path(shutil.copytree(model_folder(seed=0, scalar=scalar), tmp_path / "odd"))
    weights = load_file(odd / "model.safetensors") | {"more.weight": torch.ones(1)}
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken.jsonl").write_text("{")
    start = model_folder(seed=0)
    content = actor_critic(start, model_folder(seed=3, scalar=True), start, "broken.jsonl")
    section, field = place.split(".")
    content[section][field] = str(odd)
    code, _, said = command_line(command, recipe_file(content))
    assert code == 2
    assert f"{place}: model '{odd}' has 1 tensors that Llama" in said
    assert "no place for: more.weight" in said
    assert not (tmp_path / "runs").exists()


def test_of_a_composite_model_the_language_model_is_trained(
    recipe_file: Callable[..., Path], pairs_file: Callable[..., str], command_line: CommandLine, tmp_path: Path
) -> None:
    whole = AutoConfig.for_model("gemma3")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": EOS, "pad_token_id": PAD, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 96}
    vision = whole.vision_config.to_dict() | sizes | {"image_size": 28, "patch_size": 14}
    config = type(whole)(text_config=sizes | ends, vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    del (content := off_policy("./start", pairs_file(6)))["report"]
    content |= {"train": content["train"] | {"max_steps": 2, "weight_decay": 0.5}, "engine": {"zero_stage": 2}}
    code, said, _ = command_line("train", recipe_file(content))
    assert code == 0
    assert "is composite: its language model (gemma3_text) is trained; the rest (vision_config) is exported" in said
    final = next((tmp_path / "runs").glob("*/*/final"))
    before, after = published_tensors("./start"), published_tensors(str(final))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision" in name or "projector" in name for name in moved)
    assert len(moved) > 20
    assert (final / "config.json").read_bytes() == (tmp_path / "start" / "config.json").read_bytes()


def rewarded(tmp_path: Path, model_folder: ModelFolder, data: str, **sections: Any) -> dict[str, Any]:
    """A DPO stage whose samples are scored by a model with the words in another order."""
    build_model(seed=3, scalar=True).save_pretrained(tmp_path / "reward")
    build_tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "reward")
    content = off_policy(model_folder(seed=0), data, train={"max_steps": 1}, evaluation={"every": None, "samples": 0})
    content["report"]["reward"] = "./reward"
    return content | sections


def test_samples_are_scored_by_a_reward_model_of_another_tokenizer(
    model_folder: ModelFolder,
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    command_line: CommandLine,
    tmp_path: Path,
) -> None:
    code, _, _ = command_line("train", recipe_file(rewarded(tmp_path, model_folder, pairs_file(8))))
    assert code == 0
    [report] = (tmp_path / "runs").glob("*/report/comparison.json")
    scores = [row["metrics"]["reward_score"] for row in json.loads(report.read_text())["results"]]
    assert len(scores) == 2
    # The same model on the same tokens would score other words.
    build_tokenizer().save_pretrained(tmp_path / "reward")
    shutil.rmtree(tmp_path / "runs")
    assert command_line("train", tmp_path / "toy.yaml")[0] == 0
    others = [row["metrics"]["reward_score"] for row in json.loads(report.read_text())["results"]]
    assert all(abs(a - b) > 1e-3 for a, b in zip(scores, others, strict=True))


def test_prompts_that_it_cannot_be_told_are_refused_before_training(
    model_folder: ModelFolder,
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    command_line: CommandLine,
    tmp_path: Path,
) -> None:
    content = rewarded(tmp_path, model_folder, pairs_file(8))
    content["data"]["max_prompt_length"] = 4
    code, _, said = command_line("train", recipe_file(content))
    assert code == 2
    assert "report.reward: the reward model" in said
    assert "has another tokenizer than the policy" in said
    assert "prompts cannot be turned back into one" in said
