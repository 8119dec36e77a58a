"""The model card."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from aligndistil.models import model_hash
from aligndistil.objectives.base import MetricInfo
from aligndistil.run_folder import add_comparison, license_of, model_card
from aligndistil.run_folder.card import hub_id

HEADLINE = {
    "reward/token_mean": MetricInfo("nats a token", "", title="Reward of the policy's samples", on_samples=True),
    "rewards/accuracies": MetricInfo("share", "", title="Reward accuracy"),
    "gold_reward": MetricInfo("-1 to 1", "", title="Gold reward"),
    "loss": MetricInfo("nats", "", title="Loss"),
    "scores/mean": MetricInfo("", ""),
}
TABLE = "| model | KL |\n|---|---|\n| dpo | 0.5 |\n"


def card(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "name": "smollm2-aligndistil",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "initial": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": {"license": "apache-2.0"},
        "objective": "aligndistil",
        "scalar": False,
        "on_policy": False,
        "paper": "https://arxiv.org/abs/2503.02832",
        "models": {"reverse_teacher": "stage:reverse_dpo"},
        "data": ["HuggingFaceH4/ultrafeedback_binarized", "data/mine.jsonl", "HuggingFaceH4/ultrafeedback_binarized"],
        "metrics": {"loss": 0.123456789, "perf/step_seconds": 1.5},
        "headline": HEADLINE,
        "recipe": {"objective": {"name": "aligndistil", "r": 15}},
        "versions": {"torch": "2.13.0", "deepspeed": None},
    }
    return model_card(**facts | changes)


def metadata(text: str) -> dict[str, Any]:
    """The YAML block at the top; all readers agree on it: the Hub's own library, and YAML 1.1 and 1.2."""
    assert text.startswith("---\n")
    block = text.split("---\n")[1]
    read: dict[str, Any] = ModelCard(text).data.to_dict()
    assert read == yaml.safe_load(block) == YAML(typ="safe").load(io.StringIO(block))
    return read


def figures(text: str) -> list[list[str]]:
    """The cells of the table of the last figures."""
    table = re.search(r"## At the end of training\n\n(.*?)\n\n", text, re.DOTALL)
    assert table is not None
    _, _, *rows = table[1].splitlines()
    return [row.strip("| ").split(" | ") for row in rows]


def test_the_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    assert metadata(card()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["HuggingFaceH4/ultrafeedback_binarized"],
        "license": "apache-2.0",
        "tags": ["aligndistil"],
    }
    (tmp_path / "README.md").write_text(card())
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.license == "apache-2.0"
    assert loaded.text.lstrip().startswith("# smollm2-aligndistil\n")


@pytest.mark.parametrize("name", ["no", "1e3", "0o17", "1.5", "a: b", "#c", "'\"\\", "~", "dépenses", "x" * 200])
def test_odd_names_stay_what_they_are(name: str) -> None:
    license = {"license": "other", "license_name": name}
    data = metadata(card(objective=name, license=license))
    assert data["tags"] == ["aligndistil", name]
    assert data["license_name"] == name


def test_the_metadata_names_a_model_and_the_text_its_revision() -> None:
    text = card(base_model="owner/name@v1", initial="owner/name@v1")
    assert metadata(text)["base_model"] == "owner/name"
    assert text.count("`owner/name@v1` |") == 1


def test_a_model_of_another_stage_is_based_on_what_the_stages_began_with() -> None:
    text = card(base_model="stage:sft", initial="owner/name@v1")
    assert metadata(text)["base_model"] == "owner/name"
    assert "| base model | `stage:sft` |\n| initial model | `owner/name@v1` |\n" in text
    assert "base_model" not in metadata(card(base_model="stage:sft", initial="builtin:tiny"))


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


def test_what_is_not_known_stays_out_of_the_metadata() -> None:
    text = card(base_model="builtin:tiny", initial="builtin:tiny", data=["builtin:reviews"], license={})
    assert set(metadata(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "| base model | `builtin:tiny` |" in text
    assert "| training data | `builtin:reviews` |" in text


def test_a_few_figures_are_shown_in_words_and_rather_those_of_the_evaluation() -> None:
    metrics = {"loss": 0.5, "eval/loss": 0.6543, "rewards/accuracies": 0.574, "eval/gold_reward": -0.25, "grad_norm": 9}
    assert figures(card(metrics=metrics | {"scores/mean": 2.0})) == [
        ["Reward accuracy", "57.4 %", "the last line of the training log"],
        ["Gold reward", "-0.25 (-1 to 1)", "the last evaluation"],
        ["Loss", "0.654 nats", "the last evaluation"],
        ["`scores/mean`", "2", "the last line of the training log"],
    ]
    assert "grad_norm" not in card(metrics=metrics)
    assert "## At the end" not in card(metrics={"grad_norm": 1.0})


def test_what_only_samples_tell_of_a_policy_is_of_steps_that_sample() -> None:
    metrics = {"reward/token_mean": 0.01, "eval/reward/token_mean": 0.02}
    assert "Reward of the policy" not in card(metrics=metrics)
    row = ["Reward of the policy's samples", "0.01 nats a token", "the last line of the training log"]
    assert figures(card(metrics=metrics, on_policy=True)) == [row]


def test_the_text_names_models_and_versions() -> None:
    text = card()
    assert "| reverse teacher | `stage:reverse_dpo` |" in text
    assert "| torch | 2.13.0 |" in text
    assert "deepspeed" not in text
    assert text.endswith(" |\n")


@pytest.mark.parametrize("template", ["plain", "```{{ messages }}```", "<b>&'\"</b>", "\n## Comparison\n"])
def test_the_recipe_is_a_yaml_block_whatever_it_holds(template: str, tmp_path: Path) -> None:
    recipe = {"model": {"chat_template": template}}
    (tmp_path / "README.md").write_text(card(recipe=recipe))
    add_comparison(tmp_path, TABLE)
    fence = "````" if "```" in template else "```"
    block = (tmp_path / "README.md").read_text().split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0]
    assert yaml.safe_load(block) == recipe


def test_tables_are_not_cut_by_blank_lines() -> None:
    table = card(base_model="stage:sft").split("|---|---|\n")[1].split("\n\n")[0]
    assert all(line.startswith("|") for line in table.splitlines())
    assert len(table.splitlines()) == 6


def test_a_comparison_comes_first_and_a_newer_one_takes_its_place(tmp_path: Path) -> None:
    final = tmp_path / "README.md"
    final.write_text(card())
    add_comparison(tmp_path, TABLE)
    once = final.read_text()
    headings = [line for line in once.splitlines() if line.startswith("## ")]
    assert headings == ["## Comparison", "## At the end of training", "## Use", "## Recipe", "## Versions"]
    assert f"\n\n## Comparison\n\n{TABLE}\n## At the end" in once
    assert once.replace(f"## Comparison\n\n{TABLE}\n", "") == card()
    add_comparison(tmp_path, TABLE)
    assert final.read_text() == once
    newer = "![it](x\\1.png)\n\n### Notes\n\nnone"  # not a pattern of `re`
    add_comparison(tmp_path, newer)
    assert final.read_text() == once.replace(TABLE, f"{newer}\n")
    assert metadata(final.read_text()) == metadata(card())
    assert list(tmp_path.iterdir()) == [final]


def test_a_comparison_goes_into_any_card_and_into_no_folder_without_one(tmp_path: Path) -> None:
    add_comparison(tmp_path, TABLE)
    assert not list(tmp_path.iterdir())
    final = tmp_path / "README.md"
    for text in ("", "Somebody's own words.\n", f"# Mine\n\n## Comparison\n\n{TABLE}"):
        final.write_text(text)
        add_comparison(tmp_path, TABLE)
        add_comparison(tmp_path, TABLE)
        assert final.read_text() == text.split("## ")[0] + f"## Comparison\n\n{TABLE}"


def test_an_interrupted_comparison_leaves_the_card_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(card())

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        add_comparison(tmp_path, TABLE)
    assert (tmp_path / "README.md").read_text() == card()


def test_a_model_is_the_same_with_another_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    without = model_hash(str(tmp_path))
    (tmp_path / "README.md").write_text(card())
    assert model_hash(str(tmp_path)) == without
    add_comparison(tmp_path, TABLE)
    assert model_hash(str(tmp_path)) == without


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: qwen\nlicense_link: https://example.org/LICENSE",
            {"license": "other", "license_name": "qwen", "license_link": "https://example.org/LICENSE"},
        ),
        ("license: other\nlicense_name: qwen\nlicense_link: LICENSE", {"license": "other", "license_name": "qwen"}),
        ("language: en", {}),
        ("license: [mit, apache-2.0]", {}),
        ("license_name: qwen", {}),
        ("license: '", {}),
        ("- license", {}),
        ("", {}),
    ],
)
def test_the_license_is_that_of_the_base_models_card_or_unknown(
    header: str, known: dict[str, str], tmp_path: Path
) -> None:
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n\n# A model\n")
    assert license_of(str(tmp_path)) == known
    (tmp_path / "README.md").write_text(card(license=known))
    assert license_of(str(tmp_path)) == known  # a stage that starts from this one's model


def test_a_hub_models_license_is_known_where_its_card_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert license_of("owner/name") == license_of("owner/name", "v1") == license_of("not a Hub id") == {}
    model = tmp_path / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    (model / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (model / "snapshots" / ("a" * 40) / "README.md").write_text("---\nlicense: mit\n---\n")
    assert license_of("owner/name") == {"license": "mit"}
    assert license_of("owner/name", "v1") == {}


def test_a_hub_id_is_what_may_be_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("models/theirs") == hub_id("models/theirs@v1") == hub_id("models/theirs@refs/pr/1") == "models/theirs"
    assert hub_id("models/mine") is None
    for path in ("builtin:tiny", "stage:dpo", "./a/b", "/a/b", "../a", "~/a", "data/pairs.jsonl", "a/b/c", "gpt2", ""):
        assert hub_id(path) is None
    assert hub_id("a/b..c") is None
