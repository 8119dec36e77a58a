"""The model card."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from aligndistil.run_folder import model_card
from aligndistil.run_folder.card import is_hub_id


def card(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "name": "smollm2-aligndistil",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "objective": "dpo",
        "scalar": False,
        "paper": "https://arxiv.org/abs/2503.02832",
        "models": {"reverse_teacher": "stage:reverse_dpo"},
        "data": ["HuggingFaceH4/ultrafeedback_binarized", "data/mine.jsonl"],
        "metrics": {"loss": 0.123456789, "kl/policy_teacher": 1234567.0},
        "recipe": {"objective": {"name": "aligndistil", "r": 15}},
        "versions": {"torch": "2.13.0", "deepspeed": None},
    }
    return model_card(**facts | changes)


def metadata(text: str) -> dict[str, Any]:
    """The YAML block at the top, as the Hub's own library finds it."""
    block: dict[str, Any] = yaml.safe_load(ModelCard(text).data.to_yaml())
    return block


def test_the_metadata_is_what_the_hub_reads() -> None:
    data = metadata(card())
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["datasets"] == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["aligndistil", "dpo"]


def test_the_metadata_names_a_model_and_the_text_its_revision() -> None:
    text = card(base_model="owner/name@v1")
    assert metadata(text)["base_model"] == "owner/name"
    assert "| base model | `owner/name@v1` |" in text


@pytest.mark.parametrize(
    ("scalar", "tag", "loader", "other"),
    [
        (False, "text-generation", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
        (True, "text-classification", "AutoModelForSequenceClassification", "AutoModelForCausalLM"),
    ],
)
def test_the_card_loads_the_kind_of_model_that_it_is_of(scalar: bool, tag: str, loader: str, other: str) -> None:
    text = card(scalar=scalar)
    assert metadata(text)["pipeline_tag"] == tag
    assert f"model = {loader}.from_pretrained(" in text
    assert other not in text
    assert ("reward model" in text) is scalar


def test_local_models_and_data_stay_out_of_the_metadata() -> None:
    text = card(base_model="builtin:tiny", data=["builtin:reviews"])
    data = metadata(text)
    assert "base_model" not in data
    assert "datasets" not in data
    assert "| base model | `builtin:tiny` |" in text
    assert "| training data | `builtin:reviews` |" in text


def test_the_text_names_metrics_models_and_versions() -> None:
    text = card()
    assert "| `loss` | 0.123457 |" in text
    assert "| reverse teacher | `stage:reverse_dpo` |" in text
    assert "| torch | 2.13.0 |" in text
    assert "deepspeed" not in text


def test_without_metrics_there_is_no_empty_table() -> None:
    assert "## Metrics" not in card(metrics={})


@pytest.mark.parametrize("template", ["plain", "```{{ messages }}```", "<b>&'\"</b>"])
def test_the_recipe_is_a_yaml_block_whatever_it_holds(template: str) -> None:
    recipe = {"model": {"chat_template": template}}
    text = card(recipe=recipe)
    fence = "````" if "```" in template else "```"
    block = text.split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0]
    assert yaml.safe_load(block) == recipe


def test_tables_are_not_cut_by_blank_lines() -> None:
    table = card().split("|---|---|\n")[1].split("\n\n")[0]
    assert all(line.startswith("|") for line in table.splitlines())
    assert len(table.splitlines()) == 5


def test_a_folder_that_exists_is_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")
    assert is_hub_id("models/theirs")
    for path in ("builtin:tiny", "stage:dpo", "./a/b", "/a/b", "../a", "data/pairs.jsonl", "a/b/c", "gpt2"):
        assert not is_hub_id(path)
