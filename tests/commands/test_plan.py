"""`train --dry-run`: one table of all stages, and what to change where one does not fit."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from aligndistil.commands.cards import Card
from aligndistil.commands.data_checks import read_stages
from aligndistil.commands.plan import plan, planned, trained_on
from aligndistil.commands.recipes import shipped_recipes
from aligndistil.recipe import load_recipe

RECIPES = shipped_recipes()
CARD = Card("cuda", 80.0, 312.0)


def shown(recipe, width=100, processes=1, **asked):
    """The text of a plan on a terminal of this width."""
    console = Console(width=width, file=io.StringIO())
    for one in plan(recipe, None, processes, width=width, **asked):
        console.print(one)
    return console.file.getvalue()


def stages_of(recipe, card=CARD, processes=1):
    return {one.name: one for one in planned(recipe, read_stages(recipe, list(recipe.stages)), processes, card, set())}


@pytest.fixture
def quickstart():
    return load_recipe(RECIPES["quickstart"])


@pytest.fixture
def large(tmp_path):
    """DPO and AlignDistil of a model of 1.2 billion parameters, of which there is a configuration only."""
    from transformers import LlamaConfig

    from aligndistil.models import builtin_model, load_tokenizer
    from aligndistil.recipe import Model

    folder = tmp_path / "large"
    LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8
    ).save_pretrained(folder)
    load_tokenizer(builtin_model("builtin:tiny"), Model(path="builtin:tiny")).save_pretrained(folder)

    def make(*overrides):
        text = f"""
model: {{path: {folder}}}
data: {{train: {{path: builtin:reviews, limit: 64}}, max_prompt_length: 1024, max_response_length: 1024}}
train: {{batch_size: 16, micro_batch_size: 4}}
stages:
  dpo: {{objective: {{name: dpo}}, models: {{reference: {folder}}}}}
  other: {{objective: {{name: dpo}}, models: {{reference: {folder}}}, data: {{reverse_preferences: true}}}}
  aligndistil:
    objective: {{name: aligndistil}}
    models: {{teacher: "stage:dpo", reverse_teacher: "stage:other"}}
"""
        (tmp_path / "large.yaml").write_text(text)
        return load_recipe(tmp_path / "large.yaml", overrides)

    return make


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("card", [None, CARD, replace(CARD, memory=0.2)])
def test_a_plan_is_readable_on_terminals_of_all_widths(quickstart, width, card):
    text = shown(quickstart, width, card=card)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    head, rows = text.split("\nmodel ")[0], {}
    for name in quickstart.stages:
        rows[name] = [line for line in head.splitlines() if line.startswith(f"{name} ")]
    assert {len(lines) for lines in rows.values()} == ({1} if width == 140 else {2})
    for name, one in stages_of(quickstart, card or CARD).items():
        assert f" {one.taken.steps} " in rows[name][0]
        assert card is None or f"{one.memory.total:.2f}" in " ".join(rows[name])


def test_every_part_of_the_memory_is_in_the_table(quickstart):
    text = shown(quickstart, card=CARD)
    heads = text.split("\nmodel ")[0]
    for part in ("weights", "optimizer", "models", "vations", "head", "rollout", "GiB"):
        assert part in heads


def test_what_is_the_same_of_all_stages_is_said_once(quickstart):
    text = shown(quickstart, 200, card=CARD)
    assert text.count("1500 rows read, 1500 examples used") == 1
    assert "dpo, reverse_dpo, aligndistil: 1500 rows read" in text
    assert "policy of dpo, reverse_dpo, aligndistil; reference of dpo, reverse_dpo" in text
    assert "teacher of aligndistil" in text


def test_hours_are_said_with_the_rate_they_stand_on(quickstart):
    assert "at 40% of 312 TFLOP/s, on 2 cards" in " ".join(shown(quickstart, processes=2, card=CARD).split())
    without = shown(quickstart, card=replace(CARD, tflops=None))
    assert "hours" not in without
    assert "TFLOP" not in without


def test_without_a_card_the_memory_is_the_machines(quickstart):
    text = " ".join(shown(quickstart, card=Card("cpu", 16.0, None)).split())
    assert "of the 16 GiB of this machine, which its processes share: there is no card" in text
    assert "fits" not in shown(quickstart, card=replace(CARD, memory=None)).splitlines()[0]


def test_what_fits_needs_no_change(quickstart):
    assert "makes it less" not in shown(quickstart, card=CARD)


def test_stages_that_take_the_same_are_told_together_what_to_change(large):
    text = " ".join(shown(large(), 120, card=replace(CARD, memory=24.0)).split())
    assert text.count("What makes it less, the cheapest first") == 2
    assert "dpo, other do not fit" in text
    assert "aligndistil does not fit" in text


def test_the_cheapest_change_that_fits_does_so_when_it_is_made(large):
    card = replace(CARD, memory=40.0)
    stage = stages_of(large(), card)["dpo"]
    assert stage.fits == "no"
    (best,) = [one for one in stage.remedies if one.best]
    assert best.texts == ("model.gradient_checkpointing: true",)
    made = stages_of(large("model.gradient_checkpointing=true"), card)["dpo"]
    assert made.memory.total == best.gib
    assert made.fits == "yes"


def test_each_change_alone_gives_what_the_changed_recipe_takes(large):
    stage = stages_of(large(), replace(CARD, memory=24.0))["dpo"]
    alone = {one.texts[0]: one.gib for one in stage.remedies if len(one.texts) == 1}
    for text, gib in alone.items():
        fields, _, processes = text.partition(" with --processes ")
        sets = [one.replace(": ", "=", 1) for one in fields.split(", ")]
        made = stages_of(large(*sets), replace(CARD, memory=24.0), int(processes or 1))["dpo"]
        assert made.memory.total == pytest.approx(gib), text
    assert {text.split(":")[0] for text in alone} >= {
        "model.gradient_checkpointing",
        "train.micro_batch_size",
        "engine.teacher_cache",
        "model.lora",
        "engine.zero_stage",
    }


def test_where_no_single_change_is_enough_the_cheapest_combination_is_marked(large):
    stage = stages_of(large(), replace(CARD, memory=21.0))["dpo"]
    (best,) = [one for one in stage.remedies if one.best]
    assert len(best.texts) > 1
    assert best.fits
    assert stage.remedies[-1] is best


def test_where_nothing_is_enough_it_is_said(large):
    text = shown(large(), card=replace(CARD, memory=1.0))
    assert "Nothing of this, alone or together, is enough" in text


def test_teachers_with_adapters_on_one_base_are_that_base_once(large):
    recipe = large("model.lora={r: 16}")
    bases = {trained_on(recipe, path)[0] for path in ("stage:dpo", "stage:other", recipe.stages["dpo"].model.path)}
    assert len(bases) == 1
    stage = stages_of(recipe)["aligndistil"]
    adapters = trained_on(recipe, "stage:dpo")[1]
    assert stage.memory.frozen == pytest.approx(2 * 2 * adapters / 2**30)  # two teachers, in bfloat16
    whole = stages_of(large())["aligndistil"]
    assert whole.memory.frozen > 4


def test_a_dry_run_of_the_paper_needs_no_hub_and_no_weights():
    recipe = load_recipe(RECIPES["paper/qwen2/table1"])
    text = shown(recipe, 160, processes=8, card=CARD)
    rows = {line.split()[0]: line for line in text.split("\nmodel ")[0].splitlines() if line.split()}
    for name, stage in recipe.stages.items():
        # 61,135 pairs / 128; 60 rollouts of 1,024 for 8 steps each; KTO has two rows a pair
        steps = {"kto": 956, "ppo": 480, "rto": 480}.get(name, 478)
        assert re.search(rf"to train +{steps} +≤ ", rows[name])
        assert (rows[name].count("≤") == 2) == stage.on_policy
        assert " yes " in rows[name]
    assert "Qwen/Qwen2-1.5B-Instruct     1,543.7 M  policy of dpo" in text
    assert "The Hub cannot be reached" in text
    assert "?" not in text


def test_a_plan_of_what_only_the_hub_knows_says_so(recipe_file):
    path = recipe_file(
        {
            "model": {"path": "nobody/knows"},
            "objective": {"name": "dpo"},
            "models": {"reference": "nobody/knows"},
            "data": {"train": {"path": "nobody/has"}},
        }
    )
    text = shown(load_recipe(path), card=CARD)
    assert re.search(r"to train +\? +\?", text)
    assert "The Hub cannot be reached" in " ".join(text.split())
    assert not re.search(r"\d GiB a process", text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "80"], "--gpu-memory is of the card that a dry run plans for; add --dry-run"),
        (["--gpu-tflops", "312"], "--gpu-tflops is of the card that a dry run plans for; add --dry-run"),
        (["--dry-run", "--gpu-memory", "0"], "--gpu-memory 0: write a number above 0"),
        (["--dry-run", "--gpu-tflops", "-1"], "--gpu-tflops -1: write a number above 0"),
        (["--dry-run", "--gpu-memory", "1e30"], "--gpu-memory 1e+30: write a number above 0, as a data sheet has it"),
    ],
)
def test_a_card_belongs_to_a_dry_run(command_line, arguments, sentence):
    code, _, err = command_line("train", "quickstart", *arguments)
    assert code == 2
    assert sentence in " ".join(err.split())


def test_the_command_line_plans_for_the_card_it_is_given(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command_line(
        "train", "quickstart", "--dry-run", "--gpu-memory", "1.1", "--gpu-tflops", "100", "--stage", "dpo"
    )
    assert code == 0, err
    said = " ".join(out.split())
    assert "90% of the 1.1 GiB of a card" in said
    assert "40% of 100 TFLOP/s, on 1 card," in said
    assert "dpo does not fit" in said  # two buckets of a gigabyte
    assert not (tmp_path / "runs").exists()
