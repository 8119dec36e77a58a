"""Recipes from beginning to end, on random models: what is trained, skipped, kept, refused and reported."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import yaml
from huggingface_hub import metadata_load
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligndistil import models, objectives
from aligndistil.batch import DataKind
from aligndistil.commands import measure
from aligndistil.commands import train as pipeline
from aligndistil.commands.standing import fingerprint_of
from aligndistil.commands.train import Finished, run_recipe
from aligndistil.engine.checkpoint import checkpoints
from aligndistil.errors import EXIT_DIVERGED, DivergedError, UserError
from aligndistil.maths import mean_of, mean_tokens
from aligndistil.objectives import dpo
from aligndistil.objectives.base import Loss, Need, Objective, Role
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import StageFolder
from support.models import build_tokenizer
from support.recipes import off_policy, three_stages
from support.run_folders import differences, left_behind, lines

ModelFolder = Callable[..., str]
Told = Callable[[], str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """What was printed since it was last asked, without the console's line breaks."""
    return lambda: " ".join(capsys.readouterr().out.split())


@pytest.fixture
def three(recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]) -> Path:
    return recipe_file(three_stages(model_folder(seed=0), pairs_file(10)))


def run(recipe: Path, *overrides: str, **options: Any) -> Finished:
    return run_recipe(load_recipe(recipe, overrides), **options)


def change(recipe: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = yaml.safe_load(recipe.read_text())
    edit(content)
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize("width", [50, 60, 80, None])
def test_what_is_said_breaks_no_word_on_a_terminal_and_no_line_in_a_file(
    width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width or 80, force_terminal=width is not None, color_system=None)
    monkeypatch.setattr(pipeline.rich, "get_console", lambda: console)
    text = "▶ reverse_dpo: dpo from builtin:tiny against reference builtin:tiny, on pairs, 1500 examples, 2 steps of 16"
    pipeline._print(text)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= (width or len(text))


def test_a_recipe_leaves_what_the_documentation_says(three: Path, told: Told) -> None:
    done = run(three)
    stage = done.run / "policy"
    assert done.final == stage / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.final), AutoTokenizer.from_pretrained(done.final)
    answer = model.generate(**tokenizer("<user> w01 <bot>", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 3
    card = (done.final / "README.md").read_text()
    assert "stage:dpo" in card
    assert "| Loss | " in card
    assert metadata_load(done.final / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["aligndistil"],
    }
    names = {entry.name for entry in stage.iterdir()}
    assert {"recipe.resolved.yaml", "metrics.jsonl", "samples", "logs", "checkpoint-2", "final", "done.json"} <= names
    assert sorted(p.name for p in (stage / "samples").iterdir()) == [
        "eval-000000.jsonl",
        "eval-000003.jsonl",
        "step-000003.jsonl",
    ]
    assert done.comparison is not None
    assert [row.name for row in done.comparison.table.results] == ["initial", "dpo", "reverse", "policy"]
    assert str(done.comparison.table.kl_to) == "dpo"
    assert "## Comparison" in card
    by_name = {row.name: row.metrics for row in done.comparison.table.results}
    assert by_name["dpo"]["kl"] == pytest.approx(0, abs=1e-4)
    assert by_name["policy"]["steps"] == 3
    text = told()
    assert "dpo: dpo from" in text
    assert "teacher stage:dpo, reverse_teacher stage:reverse, on-policy, 10 examples, 3 steps of 4" in text


def test_every_metric_of_a_run_is_in_the_documentation(three: Path) -> None:
    done = run(three)
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    logged = {key for name in ("dpo", "policy") for line in lines(done.run / name) for key in line}
    missing = {name for name in logged - {"split"} if f"`{name}`" not in documented}
    assert missing == set()


def test_a_second_run_skips_everything_and_loads_no_model(
    three: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(three)
    told()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "load_model", refuse)
    second = run(three)
    text = told()
    for name in ("dpo", "reverse", "policy"):
        assert f"{name}: finished and unchanged, skipped (3 steps" in text
    assert first.comparison is not None
    assert second.comparison is not None
    assert first.comparison.table.results == second.comparison.table.results


def test_a_changed_field_trains_again_what_depends_on_it_and_keeps_the_old(three: Path, told: Told) -> None:
    done = run(three)
    old = (done.run / "reverse" / "final" / "model.safetensors").read_bytes()
    change(three, lambda content: content["stages"]["reverse"].update(train={"learning_rate": 2e-3}))
    told()
    run(three)
    text = told()
    assert "dpo: finished and unchanged, skipped" in text
    assert "reverse: trained again because train.learning_rate changed from 0.001 to 0.002" in text
    assert "policy: trained again because" in text
    kept = done.run / "reverse.old-1"
    assert (kept / "final" / "model.safetensors").read_bytes() == old
    assert (done.run / "reverse" / "final" / "model.safetensors").read_bytes() != old
    assert (done.run / "policy.old-1").is_dir()
    assert not (done.run / "dpo.old-1").exists()


def test_what_follows_a_stage_that_became_another_model_is_done_again(
    three: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(three)
    told()
    loss = dpo.dpo_loss

    def swapped(*, logratio_chosen: torch.Tensor, logratio_rejected: torch.Tensor, **rest: Any) -> torch.Tensor:
        return loss(logratio_chosen=logratio_rejected, logratio_rejected=logratio_chosen, **rest)

    monkeypatch.setattr(dpo, "dpo_loss", swapped)
    asked_the_same = run(three, stage="dpo", fresh=True)
    assert "dpo: trained again because of --fresh" in told()
    after = run(three)
    text = told()
    assert "dpo: finished and unchanged, skipped" in text
    assert "policy: trained again because dpo, which it uses, became another model" in text
    assert asked_the_same.run == after.run
    assert before.comparison is not None
    assert after.comparison is not None
    rows = [{row.name: row.metrics for row in one.comparison.table.results} for one in (before, after)]
    assert rows[0]["dpo"]["kl_initial_data"] != rows[1]["dpo"]["kl_initial_data"]
    assert rows[0]["initial"]["kl_data"] != rows[1]["initial"]["kl_data"]


def test_what_only_looks_at_a_stage_does_not_train_it_again(three: Path, told: Told) -> None:
    run(three)
    told()

    def edit(content: dict[str, Any]) -> None:
        content["evaluation"]["every"] = 1
        content["logging"]["every"] = 1
        content["checkpoint"]["keep"] = 9
        content["report"]["samples"] = 2

    change(three, edit)
    again = run(three)
    assert told().count("finished and unchanged") == 3
    assert again.comparison is not None
    assert len((again.run / "report" / "samples" / "dpo.jsonl").read_text().splitlines()) == 2


def test_one_stage_trains_what_it_depends_on_and_compares_nothing(three: Path) -> None:
    done = run(three, stage="reverse")
    assert done.final == done.run / "reverse" / "final"
    assert done.comparison is None
    assert not (done.run / "dpo").exists()
    with pytest.raises(UserError, match="--stage polisy: the recipe has no such stage; it has dpo, reverse, policy"):
        run(three, stage="polisy")


def test_fresh_trains_again_and_keeps_the_old(three: Path, told: Told) -> None:
    done = run(three, stage="dpo")
    before = left_behind(done.run / "dpo")
    told()
    run(three, stage="dpo", fresh=True)
    assert "dpo: trained again because of --fresh; the old folder is kept as" in told()
    assert list(differences(before, left_behind(done.run / "dpo"))) == []
    assert list(differences(before, left_behind(done.run / "dpo.old-1"))) == []


def test_a_lost_final_model_is_trained_again_and_what_came_after_stands(three: Path, told: Told) -> None:
    done = run(three)
    shutil.rmtree(done.run / "reverse" / "final")
    told()
    run(three)
    text = told()
    assert "reverse: trained again because its final model is gone" in text
    assert text.count("finished and unchanged") == 2


@pytest.mark.parametrize("what", ["data", "template", "model"])
def test_changed_files_train_again_though_the_recipe_is_the_same(
    what: str,
    told: Told,
    recipe_file: Callable[..., Path],
    model_folder: ModelFolder,
    pairs_file: Callable[..., str],
    tmp_path: Path,
) -> None:
    model = shutil.copytree(model_folder(seed=0), tmp_path / "model")
    template = tmp_path / "chat.jinja"
    template.write_text(build_tokenizer().chat_template)
    content = off_policy(str(model), pairs_file(10), model={"chat_template": str(template)}, train={"max_steps": 1})
    del content["evaluation"], content["data"]["eval"]
    recipe = recipe_file(content)
    run(recipe)
    if what == "data":
        pairs_file(10, seed=1)
    elif what == "template":
        template.write_text(build_tokenizer().chat_template.replace("<bot>", "<bot> <bot>"))
    else:
        shutil.copytree(model_folder(seed=1), model, dirs_exist_ok=True)
    told()
    run(recipe)
    assert "trained again because its data, its models or this package changed" in told()


def test_each_split_of_a_source_counts(told: Told, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A folder of two splits, both read; the one that is named first changes."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"prompt": "w01", "chosen": "w02", "rejected": "w03"}\n' * 8)
    sources = [{"path": str(folder), "split": split} for split in ("train", "test")]
    stage = off_policy("builtin:tiny", "unused", data={"train": sources, "eval": None}, train={"max_steps": 1})
    (loaded,) = load_recipe(recipe_file({**stage, "evaluation": {}})).stages.values()
    before = fingerprint_of(loaded, StageFolder(tmp_path), {})
    (folder / "train.jsonl").write_text('{"prompt": "w01", "chosen": "w02", "rejected": "w04"}\n' * 8)
    assert fingerprint_of(loaded, StageFolder(tmp_path), {}) != before


def test_an_unfinished_run_of_another_version_is_kept_aside(three: Path, told: Told) -> None:
    run(three, stage="dpo")
    stage = three.parent / "runs" / "toy" / "dpo"
    (stage / "done.json").unlink()
    change(three, lambda content: content["train"].update(seed=1))
    told()
    run(three, stage="dpo")
    assert "an unfinished run of another version of this stage was here; the old folder is kept as" in told()


def test_resume_never_starts_over_and_keeps_what_was_there(three: Path, told: Told) -> None:
    run(three, stage="dpo")
    stage = three.parent / "runs" / "toy" / "dpo"
    (stage / "done.json").unlink()
    told()
    run(three, "checkpoint.resume=never", stage="dpo")
    assert "an unfinished run was here, and checkpoint.resume is never; the old folder is kept as" in told()
    assert [path.name for path in checkpoints(stage)] == ["checkpoint-2"]
    assert len(lines(stage)) == len(lines(stage.with_name("dpo.old-1")))


def test_a_folder_that_is_no_run_is_left_alone(three: Path) -> None:
    mine = three.parent / "runs" / "toy"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"output_dir: .* holds files that are not an aligndistil run"):
        run(three)
    assert [entry.name for entry in mine.iterdir()] == ["thesis.tex"]


def test_models_and_batches_are_checked_before_anything_is_made(three: Path, model_folder: ModelFolder) -> None:
    change(three, lambda content: content["stages"]["dpo"].update(models={"reference": "no/such/model"}))
    with pytest.raises(UserError, match=r"toy.yaml:\d+:\d+: .*model 'no/such/model' does not exist"):
        run(three)
    assert not (three.parent / "runs").exists()


def test_a_killed_comparison_measures_only_what_is_missing(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    own = measure.Evaluator.measure

    def counted(self: Any, model: Any, **against: Any) -> Any:
        measured.append(model)
        return own(self, model, **against)

    def dies_at_the_third(self: Any, model: Any, **against: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(self, model, **against)

    monkeypatch.setattr(measure.Evaluator, "measure", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(three)
    kept = three.parent / "runs" / "toy" / "report" / "models"
    assert sorted(file.stem for file in kept.glob("*.json")) == ["dpo", "initial"]
    before = (kept / "dpo.json").stat().st_mtime_ns
    measured.clear()
    monkeypatch.setattr(measure.Evaluator, "measure", counted)
    done = run(three)
    assert len(measured) == 2
    assert (kept / "dpo.json").stat().st_mtime_ns == before
    assert done.comparison is not None
    assert all(row.metrics["kl"] >= -1e-4 for row in done.comparison.table.results)


def test_a_reference_that_is_not_what_is_trained_is_caught_at_the_first_step(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names one model for both, and what is loaded for the reference is another."""

    def perturbed(path: str, section: Any, *, trained: bool) -> Any:
        model = models.load_model(path, section, trained=trained)
        if not trained:
            with torch.no_grad():
                model.lm_head.weight.mul_(1.3)
        return model

    monkeypatch.setattr("aligndistil.models.bases.load_model", perturbed)
    with pytest.raises(DivergedError, match=r"stage dpo: the first step has .* likely causes: the reference is not"):
        run(three, stage="dpo")
    assert not (three.parent / "runs" / "toy" / "dpo" / "final").exists()


@pytest.mark.parametrize("beta", [0.001, 0.5, 3])
def test_how_far_the_reference_may_be_at_the_first_step_is_in_nats_whatever_beta(
    beta: float,
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    factor = 1.0

    def perturbed(path: str, section: Any, *, trained: bool) -> Any:
        model = models.load_model(path, section, trained=trained)
        if not trained:
            with torch.no_grad():
                model.lm_head.weight.mul_(factor)
        return model

    monkeypatch.setattr("aligndistil.models.bases.load_model", perturbed)
    settings = {"objective": {"beta": beta}, "train": {"max_steps": 1}, "evaluation": {"every": None}}
    recipe = recipe_file(off_policy(model_folder(seed=0, tied=False), pairs_file(10), **settings))
    factor = 1.003  # about 0.05 nats a response
    with pytest.raises(DivergedError, match="the first step has rewards/"):
        run(recipe)
    factor = 1.000001
    run(recipe)


def test_dropout_that_is_still_active_is_switched_off(
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from support.models import build_model

    build_model(seed=0).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")

    def with_dropout(path: str, section: Any, *, trained: bool) -> Any:
        model = models.load_model(path, section, trained=trained)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    monkeypatch.setattr("aligndistil.models.bases.load_model", with_dropout)
    recipe = recipe_file(off_policy(str(tmp_path / "model"), pairs_file(10), logging={"every": 1}))
    done = run(recipe)
    assert "(LlamaForCausalLM) is random in training mode" in caplog.text
    first = next(line for line in lines(done.run / "dpo") if line["split"] == "train")
    assert (first["step"], first["rewards/chosen"]) == (1, 0.0)


def test_a_reference_that_is_meant_to_be_another_model_is_not_checked(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]
) -> None:
    content = off_policy(
        model_folder(seed=0), pairs_file(10), models={"reference": model_folder(seed=1)}, train={"max_steps": 1}
    )
    done = run(recipe_file(content))
    first = next(line for line in lines(done.run / "dpo") if line["split"] == "train")
    assert abs(first["rewards/chosen"]) > 0.02


def test_after_sft_dpo_has_one_reward_accuracy_everywhere(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]
) -> None:
    """Its own evaluation, the table of models and the table of rewards: against the SFT model that it began from."""
    content = off_policy(model_folder(seed=0), pairs_file(12), train={"max_steps": 4, "learning_rate": 3e-4})
    objective, models = content.pop("objective"), content.pop("models")
    after = {"objective": objective, "model": {"path": "stage:sft"}, "models": {**models, "reference": "stage:sft"}}
    content["stages"] = {"sft": {"objective": {"name": "sft"}}, "dpo": after}
    content["data"]["eval"].pop("limit")
    content["report"] |= {"reward_accuracy": True, "pairs": None}
    recipe = recipe_file(content)
    finished = run(recipe)
    assert finished.comparison is not None
    table = finished.comparison.table
    evaluated = lines(recipe.parent / "runs" / "toy" / "dpo")[-1]
    assert evaluated["split"] == "eval"
    own = table.row("dpo").metrics["rewards/accuracies"]
    assert own == evaluated["rewards/accuracies"]
    (reward,) = [reward for reward in table.rewards if reward.of == "dpo"]
    assert reward.name == "dpo / sft"
    (shares,) = reward.shares("eval")
    assert sum(shares) / len(shares) == own
    assert "rewards/accuracies" not in table.row("sft").metrics
    assert (finished.run / "report" / "comparison.md").read_text().count(f"| {100 * own:.1f} ") >= 2


def test_evaluations_measure_how_far_the_policy_has_come_from_where_training_began(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]
) -> None:
    """Through the stage that it starts from, on its own answers, over the whole vocabulary."""
    base = model_folder(seed=0)
    content = off_policy(base, pairs_file(10), train={"max_steps": 2, "learning_rate": 1e-2})
    objective, models = content.pop("objective"), content.pop("models")
    content["evaluation"] |= {"every": 1, "samples": 3, "kl_initial": True, "batch_size": 2}
    after = {"objective": objective, "model": {"path": "stage:sft"}, "models": {**models, "reference": "stage:sft"}}
    content["stages"] = {"sft": {"objective": {"name": "sft"}}, "dpo": after}
    recipe = recipe_file(content)
    run(recipe)
    stages = recipe.parent / "runs" / "toy"
    first, *_, last = [line["kl_initial"] for line in lines(stages / "sft") if line["split"] == "eval"]
    assert first == pytest.approx(0.0, abs=1e-6)
    assert last > 0.01
    dpo = [line["kl_initial"] for line in lines(stages / "dpo") if line["split"] == "eval"]
    assert dpo[0] > 0.01  # it began from the SFT model
    policy, initial = (AutoModelForCausalLM.from_pretrained(path) for path in (stages / "dpo" / "final", base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    total = 0.0
    rows = [json.loads(line) for line in (stages / "dpo" / "samples" / "eval-000002.jsonl").read_text().splitlines()]
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *row["token_ids"]]])
        ours, theirs = (model(ids).logits.detach().log_softmax(-1)[0] for model in (policy, initial))
        at = slice(len(prompt) - 1, -1)
        total += float((ours[at].exp() * (ours[at] - theirs[at])).sum())
    assert dpo[-1] == pytest.approx(total / len(rows), rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_diverging_run_exports_nothing_and_keeps_its_last_good_checkpoint(
    stage: int, recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str]
) -> None:
    """Two steps of warm-up at almost nothing, then a learning rate of 1e30."""
    content = off_policy(
        model_folder(seed=0),
        pairs_file(10),
        train={"learning_rate": 1e30, "warmup_ratio": 0.0},
        checkpoint={"every": 1},
        evaluation={"every": None, "samples": 0},
        engine={"zero_stage": stage},
    )
    recipe = recipe_file(content)
    with pytest.raises(DivergedError, match=r"stage dpo: the (loss|gradient norm) is (nan|inf|-inf) at step") as caught:
        run(recipe)
    assert caught.value.exit_code == EXIT_DIVERGED
    folder = recipe.parent / "runs" / "toy" / "dpo"
    assert checkpoints(folder)
    assert not (folder / "final").exists()
    assert not (folder / "done.json").exists()
    with pytest.raises(DivergedError):  # it loads, and diverges again
        run(recipe)


class Poison(Objective):
    """A loss that is not a number at the third step."""

    data = DataKind.RESPONSES
    paper = "none"
    name: Literal["poison"] = "poison"
    seen: ClassVar[list[int]] = []

    @property
    def needs(self) -> dict[str, Need]:
        return {Role.POLICY: Need.LOGP}

    def token_terms(self, chunk: Any) -> dict[str, torch.Tensor]:
        return {"logp": chunk.logp[Role.POLICY]}

    def loss(self, batch: Any, terms: Any) -> Loss:
        if terms["logp"].dtype == torch.float32:  # in float64 the engine asks for the direction of the loss
            self.seen.append(1)
        losses = -mean_tokens(terms["logp"], batch.response_BT)
        return Loss(losses * (float("nan") if len(self.seen) > 4 else 1.0), {"plain": mean_of(losses)})


def test_a_loss_that_is_no_number_stops_and_the_last_checkpoint_goes_on(
    recipe_file: Callable[..., Path], model_folder: ModelFolder, pairs_file: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    known = {**objectives.registry(), "poison": Poison}
    monkeypatch.setattr("aligndistil.objectives.registry", lambda: known)
    content = off_policy(model_folder(seed=0), pairs_file(10), checkpoint={"every": 1}, train={"max_steps": 4})
    content["objective"] = {"name": "poison"}
    del content["models"], content["evaluation"], content["data"]["eval"]
    recipe = recipe_file(content)
    Poison.seen.clear()
    with pytest.raises(DivergedError, match="stage poison: the loss is nan at step 3"):
        run(recipe)
    folder = recipe.parent / "runs" / "toy" / "poison"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    Poison.seen.clear()
    Poison.seen.extend([1] * -4)  # healed: the two steps that are left take four micro-batches
    assert run(recipe).final.is_dir()
    assert json.loads((folder / "done.json").read_text())["step"] == 4


def run_here(recipe: str, overrides: list[str]) -> None:
    run_recipe(load_recipe(Path(recipe), overrides))


def test_two_processes_give_the_losses_of_one(three: Path, on_processes: Callable[..., list[Any]]) -> None:
    """DPO with ZeRO-2, and rollouts of a policy that ZeRO-3 gathers for every token."""
    nothing_stays = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    sharded = {"zero_stage": 3, "deepspeed": nothing_stays}
    change(three, lambda content: content["stages"]["policy"].update(engine=sharded))
    settings = ["logging.every=1", "train.max_steps=4", "train.micro_batch_size=1", "engine.zero_stage=2"]
    one = run(three, *settings, "output_dir=one").run
    on_processes(run_here, str(three), [*settings, "output_dir=two"], timeout=300)
    two = three.parent / "two"
    for stage in ("dpo", "reverse", "policy"):
        ours, theirs = lines(one / stage), lines(two / stage)
        assert [line.pop("split") for line in ours] == [line.pop("split") for line in theirs]
        for a, b in zip(ours, theirs, strict=True):
            # Adam divides a gradient by its own size: where that is almost 0, rounding becomes a whole step.
            early = a.get("step", 0) < 2
            assert a == pytest.approx(b, abs=1e-5, rel=1e-4 if early else 2e-3)
            assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5 if early else 1e-4)
    for samples in ("eval-000004.jsonl", "step-000004.jsonl"):
        drawn = [(folder / "policy" / "samples" / samples).read_text().splitlines() for folder in (one, two)]
        assert drawn[0][: len(drawn[1])] == drawn[1]  # rank 0 writes its own share of a rollout
    tables = [json.loads((folder / "report" / "models" / "policy.json").read_text()) for folder in (one, two)]
    assert tables[0]["metrics"] == pytest.approx(tables[1]["metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_give_the_losses_of_one_on_the_quickstart(
    on_processes: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    one = run(recipe, f"output_dir={tmp_path / 'one'}").run
    on_processes(run_here, str(recipe), [f"output_dir={tmp_path / 'two'}"], timeout=1500)
    for stage in load_recipe(recipe).stages.values():
        pairs = zip(lines(one / stage.name), lines(tmp_path / "two" / stage.name), strict=True)
        far = [a["step"] for a, b in pairs if abs(a.get("loss", 0) - b.get("loss", 0)) > 1e-5]
        assert far == [], stage.name
