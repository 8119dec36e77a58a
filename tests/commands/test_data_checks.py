"""What a recipe's data are refused for before anything is trained, by `validate`, `--dry-run` and `train` alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.commands import train as training
from aligndistil.commands.data_checks import existing
from aligndistil.commands.plan import plan
from aligndistil.commands.train import run_recipe
from aligndistil.commands.validate import check
from aligndistil.data import sources_of
from aligndistil.errors import UserError
from aligndistil.evaluation.measurements import measurements_of, read_eval_set
from aligndistil.files import cache_root
from aligndistil.recipe import changed_sections, load_recipe, stage_fingerprint
from aligndistil.token_view.responses import Request, choose
from aligndistil.token_view.trained import TrainedStage
from aligndistil.training import data_lines, gold_reward_of, load_stage_data
from support.models import build_tokenizer
from support.recipes import merged, off_policy, on_policy, three_stages, unpaired

ModelFolder = Callable[..., str]
WAYS = {
    "validate": lambda recipe: [str(line) for line in check(recipe, 1)],
    "dry run": lambda recipe: [str(line) for line in plan(recipe, None, 1)],
    "train": run_recipe,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """A model with a table of so many positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def save(positions: int) -> str:
        folder = tmp_path_factory.mktemp("short")
        ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
        GPT2LMHeadModel(
            GPT2Config(n_positions=positions, n_embd=32, n_layer=1, n_head=2, vocab_size=96, **ends)
        ).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return str(folder)

    return save


def rows(count: int, prompt: int, response: int) -> list[dict[str, Any]]:
    """Prompts and responses of at most so many words; the second is the longest."""
    texts = [
        (" ".join(["w01"] * prompt), " ".join(["w02"] * response)) if i == 1 else ("w01", f"w{i + 10}")
        for i in range(count)
    ]
    return [{"prompt": asked, "chosen": text, "rejected": f"w00 {i:02d}"} for i, (asked, text) in enumerate(texts)]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., str]:
    def write(content: list[dict[str, Any]], name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path / name)

    return write


TEN = "data.max_prompt_length and data.max_response_length, to 16 together"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        # A prompt of 5 words has two tokens more, a response one.
        ({}, r"the longest row \(data\.jsonl#train:2\) needs 17; lower data\.max_prompt_length and data\.max_resp"),
        ({"data": {"max_response_length": 9}}, None),
        (
            {"data": {"max_response_length": 9}, "evaluation": {"samples": 2, "max_new_tokens": 10}},
            r"evaluation\.samples with evaluation\.max_new_tokens needs 17; lower evaluation\.max_new_tokens and",
        ),
        (
            {"data": {"max_response_length": 9}, "report": {"max_new_tokens": 12}},
            r"of the comparison with report\.max_new_tokens needs 19; lower report\.max_new_tokens",
        ),
        (
            {"data": {"max_response_length": 9, "train": {"limit": 1}, "eval": {"limit": 4}}, "report": None},
            None,
        ),
    ],
)
def test_texts_longer_than_the_table_of_positions_are_refused(
    recipe_file: Callable[..., Path],
    short: Callable[[int], str],
    data: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    change: dict[str, Any],
    told: str | None,
) -> None:
    data(rows(8, 5, 9))
    small = {"evaluation": {"samples": 0, "every": None}, "report": {"samples": 4, "max_new_tokens": 2}}
    content = merged(off_policy(short(16), "data.jsonl"), merged(small, {k: v for k, v in change.items() if v}))
    recipe = load_recipe(recipe_file(content))
    if told is None:
        WAYS["validate"](recipe)
        return
    monkeypatch.setattr(training, "process_group", lambda _: pytest.fail("something was started"))
    with pytest.raises(UserError, match=rf"toy\.yaml:\d+:\d+: \S+: model \S+ has 16 positions, and .*{told}"):
        WAYS[way](recipe)


def test_a_rollout_that_may_be_longer_is_refused_for_every_model_that_reads_it(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, short: Callable[[int], str], data: Callable[..., str]
) -> None:
    data(rows(8, 5, 2))
    model = model_folder(seed=0)
    content = on_policy(model, model, short(16), "data.jsonl", rollout={"max_new_tokens": 10})
    told = r"models\.reverse_teacher: model \S+ has 16 positions, and the longest prompt \(data\.jsonl#train:2\) with "
    with pytest.raises(UserError, match=f"{told}rollout.max_new_tokens needs 17; lower rollout"):
        WAYS["validate"](load_recipe(recipe_file(content)))
    assert WAYS["validate"](load_recipe(recipe_file(content), ["rollout.max_new_tokens=9"]))


def test_a_rotary_model_is_only_warned_about(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data(rows(8, 5, 9))
    model = model_folder(seed=0, max_position_embeddings=16)
    told = "\n".join(WAYS["validate"](load_recipe(recipe_file(off_policy(model, "data.jsonl")))))
    assert "has 16 positions, and the longest row (data.jsonl#train:2) needs 17, more than it was made for" in told


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("stage", "change", "place"),
    [
        ("policy", {"train": {"path": "gone.jsonl"}}, r"data\.train\.path: data source gone\.jsonl: there is no"),
        ("policy", {"eval": {"path": "gone.jsonl"}}, r"data\.eval\.path: data source gone\.jsonl: there is no"),
        ("policy", {"train": [{"path": "data.jsonl"}, {"path": "no.jsonl"}]}, r"data\.train\.1\.path: data source no"),
        ("reverse", {"train": {"path": "prompts.jsonl"}}, r"data\.train\.path: .*eats pairs"),
        ("policy", {"train": {"path": "odd.jsonl"}}, r"data\.train\.path: .*make no known format"),
    ],
)
def test_sources_of_every_stage_are_looked_at_before_the_first_is_read(
    recipe_file: Callable[..., Path],
    model_folder: ModelFolder,
    data: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    stage: str,
    change: dict[str, Any],
    place: str,
) -> None:
    data(rows(8, 2, 2))
    data([{"prompt": "w01"}], "prompts.jsonl")
    data([{"word": 1, "other": 2}], "odd.jsonl")
    content = three_stages(model_folder(seed=0), "data.jsonl", stages={stage: {"data": change}})
    recipe = load_recipe(recipe_file(content))
    monkeypatch.setattr(training, "process_group", lambda _: pytest.fail("something was started"))
    with pytest.raises(UserError, match=rf"toy\.yaml:\d+:\d+: (stages\.{stage}\.)?{place}") as refused:
        WAYS[way](recipe)
    line = int(re.search(r"toy\.yaml:(\d+):", str(refused.value))[1])  # type: ignore[index]
    written = Path("toy.yaml").read_text().splitlines()[line - 1]
    assert written.strip().lstrip("- ").startswith("path: ")
    assert not (cache_root() / "data").exists()


def test_rows_are_read_once_whatever_is_done_with_them_afterwards(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data(rows(8, 2, 2))
    stages = {"reverse": {"model": {"path": "stage:dpo"}, "data": {"reverse_preferences": False}}}
    recipe = load_recipe(recipe_file(three_stages(model_folder(seed=0), "data.jsonl", stages=stages)))
    WAYS["validate"](recipe)
    kept = sorted(path.name for path in (cache_root() / "data").iterdir())
    run_recipe(recipe)
    assert sorted(path.name for path in (cache_root() / "data").iterdir()) == kept


def test_one_class_and_the_report_are_known_before_training(
    recipe_file: Callable[..., Path],
    model_folder: ModelFolder,
    data: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    liked = [{"prompt": f"w{i:02d}", "completion": f"w0{i}", "label": True, "id": i} for i in range(4)]
    file = recipe_file(unpaired(model_folder(seed=0), "data.jsonl", train={"batch_size": 8, "max_steps": 1}))
    data(liked)
    for way in WAYS.values():
        with pytest.raises(UserError, match="all 4 examples are desirable and none is undesirable"):
            way(load_recipe(file))
    data([*liked, {**liked[0], "label": False, "completion": "w55"}])
    run_recipe(load_recipe(file))
    told = " ".join(capsys.readouterr().out.split())
    for line in (
        "columns that nothing reads: id",
        "5 of 5 examples to evaluate on are in the training data too",
        "an epoch has 5 unpaired, fewer than a batch of 8: every step sees some of them more than once",
        "evaluation: 5 rows read, 5 examples used",
    ):
        assert line in told


def test_prompts_shared_with_the_evaluation_of_a_rollout_are_counted(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data(rows(8, 2, 2))
    data([{"prompt": "w77 w78"}, *({"prompt": row["prompt"]} for row in rows(2, 2, 2))], "eval.jsonl")
    model = model_folder(seed=0)
    content = on_policy(model, model, model, "data.jsonl", data={"eval": {"path": "eval.jsonl"}})
    (stage,) = load_recipe(recipe_file(content)).stages.values()
    lines = data_lines(stage, load_stage_data(stage, str))
    assert "2 of 3 prompts to evaluate on are in the training data too" in lines


def test_a_share_held_out_is_trained_and_compared_with_like_data_of_their_own(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data([{"prompt": f"w{i}", "chosen": f"w{i} w01", "rejected": f"w{i} w02"} for i in range(30)])
    held = {"data": {"eval": {"fraction": 0.2, "seed": 3, "path": None, "limit": None}}}
    recipe = load_recipe(recipe_file(three_stages(model_folder(seed=0), "data.jsonl", **held)))
    done = run_recipe(recipe)
    assert done.comparison is not None
    (stage, *_) = recipe.stages.values()
    read = load_stage_data(stage, str)
    assert read.eval is not None
    assert len(read.train) + len(read.eval) == 30
    assert 1 <= len(read.eval) <= 15
    (comparison,) = [result for result in done.comparison.table.results if result.name == "dpo"]
    (accuracies,) = comparison.values["rewards/accuracies"]
    assert len(accuracies) == len(read.eval)


def test_all_that_reads_a_prompt_gives_the_template_the_recipes_arguments(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str], tmp_path: Path
) -> None:
    data([{"prompt": f"w{i}", "chosen": f"w{i} w01", "rejected": f"w{i} w02"} for i in range(20, 40)])
    template = (
        "{% for m in messages %}{{ ('<user> ' if m.role == 'user' else '<bot> ') + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ mode }} <bot>{% endif %}"
    )
    model = {"chat_template": template, "chat_template_kwargs": {"mode": "w07"}}
    options = {"data": {"on_boundary_mismatch": "shift"}, "model": model}
    recipe = load_recipe(recipe_file(three_stages(model_folder(seed=0), "data.jsonl", **options)))
    for stage in recipe.stages.values():
        read = load_stage_data(stage, lambda path: existing(recipe, path))
        assert read.eval_prompts is not None
        seven = read.tokenizer.convert_tokens_to_ids("w07")
        sampled = read.train if stage.on_policy else read.eval_prompts
        for examples in (sampled, read.eval_prompts):
            assert {seven in examples.prompt_ids(i) for i in range(len(examples))} == {True}
    measurements = measurements_of(recipe)
    assert measurements is not None
    prompts = read_eval_set(measurements, lambda path: existing(recipe, path)).prompts
    assert prompts
    assert {seven in ids for ids in prompts} == {True}
    trained = TrainedStage(
        "policy", tmp_path, stage.objective, stage.model, {}, {}, stage.data, stage.rollout, seed=0, steps=1
    )
    shown = choose(trained, Request(prompts=["w30"]), read.tokenizer, read.stop_ids)
    assert [seven in one.ids for one in shown] == [True]


def test_arguments_that_the_template_does_not_read_are_refused_where_they_stand(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data(rows(8, 2, 2))
    content = off_policy(model_folder(seed=0), "data.jsonl", model={"chat_template_kwargs": {"thinking": False}})
    told = r"toy\.yaml:\d+:\d+: model\.chat_template_kwargs: the chat template does not read 'thinking'; take it out"
    with pytest.raises(UserError, match=told):
        WAYS["validate"](load_recipe(recipe_file(content)))


def test_what_the_comparison_will_read_is_read_before_training(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    """On-policy stages read prompts alone; the comparison reads both answers of the pairs too."""
    broken = [{"prompt": f"w{i}", "chosen": f"w{i} w01", "rejected": "" if i % 2 else "w02"} for i in range(20, 40)]
    data(broken)
    model = model_folder(seed=0)
    content = on_policy(model, model, model_folder(seed=1), "data.jsonl")
    with pytest.raises(UserError, match=r"2 of 5 examples cannot be used.*empty response"):
        WAYS["validate"](load_recipe(recipe_file(content)))


def test_what_is_held_out_is_part_of_the_result_and_how_many_prepare_it_is_not(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, data: Callable[..., str]
) -> None:
    data(rows(8, 2, 2))
    file = recipe_file(
        off_policy(model_folder(seed=0), "data.jsonl", data={"eval": {"path": "data.jsonl", "limit": 2}})
    )

    def stage(*overrides: str) -> Any:
        (only,) = load_recipe(file, overrides).stages.values()
        return only

    def fingerprint(*overrides: str) -> str:
        return stage_fingerprint(stage(*overrides), {}, {}, "1")

    def held(fraction: float, seed: int = 0) -> str:
        return f"data.eval={{fraction: {fraction}, seed: {seed}}}"

    assert fingerprint() == fingerprint("data.eval.limit=1") == fingerprint("data.workers=2")
    assert len({fingerprint(), fingerprint(held(0.1)), fingerprint(held(0.2)), fingerprint(held(0.1, 1))}) == 4
    old, new = stage(held(0.1)).resolved(), stage(held(0.2)).resolved()
    assert changed_sections(old, new) == ["data.eval.fraction changed from 0.1 to 0.2"]


@pytest.mark.parametrize(
    ("train", "held", "sources", "gold"),
    [
        ("builtin:reviews", {"fraction": 0.1}, ["builtin:reviews"], True),
        ("builtin:reviews", None, [], True),
        ("data.jsonl", {"path": "builtin:reviews"}, ["builtin:reviews"], True),
        ("data.jsonl", {"fraction": 0.1}, ["data.jsonl"], False),
    ],
)
def test_where_the_evaluation_data_come_from(train: str, held: Any, sources: list[str], gold: bool) -> None:
    from aligndistil.recipe import Data

    section = Data.model_validate({"train": {"path": train}, "eval": held})
    assert [source.path for source in sources_of(section, "eval")] == sources
    assert (gold_reward_of(section) is not None) is gold
