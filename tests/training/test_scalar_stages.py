"""Stages that train or are given a scalar head: what they leave, what they refuse, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from aligndistil.batch import Batch, collate
from aligndistil.data import Examples
from aligndistil.engine.processes import Processes
from aligndistil.engine.scalar import ScalarModel
from aligndistil.errors import UserError
from aligndistil.maths import last_tokens, sum_tokens
from aligndistil.models import load_scalar_model
from aligndistil.recipe import Stage, load_recipe
from aligndistil.run_folder import StageFolder
from aligndistil.stop import StopSignal
from aligndistil.training import StageTraining
from support.models import EOS, build_model, build_tokenizer
from support.recipes import actor_critic, scoring, unpaired
from support.run_folders import lines

ModelFolder = Callable[..., str]
Launch = Callable[..., StageTraining]


@pytest.fixture
def launch(recipe_file: Callable[..., Path], processes: Processes, tmp_path: Path) -> Launch:
    """A stage in the folder `run/NAME`, ready to be trained."""

    def make(content: dict[str, Any], name: str = "one") -> StageTraining:
        stage: Stage
        (stage,) = load_recipe(recipe_file(content)).stages.values()
        return StageTraining(stage, StageFolder(tmp_path / "run" / name), lambda path: path, processes)

    return make


@pytest.fixture
def pairs(pairs_file: Callable[..., str]) -> str:
    return pairs_file(10)


def run(launched: StageTraining) -> tuple[Path, dict[str, float]]:
    outcome = launched.run(StopSignal())
    return launched.folder.final, outcome.metrics


def all_of(examples: Examples) -> Batch:
    return collate([row for i in range(len(examples)) for row in examples.rows(i)], examples.kind, 0)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_reward_model_is_an_ordinary_folder_that_gives_the_scores_it_was_trained_with(
    zero: int, launch: Launch, model_folder: ModelFolder, pairs: str
) -> None:
    """It starts from a language model, and evaluates as transformers does."""
    launched = launch(scoring(model_folder(seed=0), pairs, engine={"zero_stage": zero}))
    final, metrics = run(launched)
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).get_vocab() == build_tokenizer().get_vocab()
    assert not (final / "generation_config.json").exists()
    assert launched.data.eval is not None
    batch = all_of(launched.data.eval)
    with torch.no_grad():
        score_B = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits.squeeze(-1)
    assert metrics["eval/rewards/chosen"] == pytest.approx(float(score_B[0::2].mean()), abs=1e-5)
    assert metrics["eval/rewards/rejected"] == pytest.approx(float(score_B[1::2].mean()), abs=1e-5)
    margin_E = score_B[0::2] - score_B[1::2]
    assert metrics["eval/loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margin_E).mean()), abs=1e-5)
    assert float(score_B.std()) > 0.01
    ours = ScalarModel(load_scalar_model(str(final), launched.stage.model, trained=False)).scores(batch)
    torch.testing.assert_close(sum_tokens(ours, last_tokens(batch.response_BT)), score_B)
    # What a stage that normalizes reads: of these very scores.
    assert model.config.score_mean == pytest.approx(float(score_B.mean()), abs=1e-5)
    assert model.config.score_std == pytest.approx(float(score_B.std(correction=0)), rel=1e-3)
    losses = [line["loss"] for line in lines(launched.folder.path) if line["split"] == "train"]
    assert losses[-1] < losses[0]


def test_a_new_head_is_drawn_by_the_seed_of_the_stage(launch: Launch, model_folder: ModelFolder, pairs: str) -> None:
    settings: dict[str, Any] = {"evaluation": {"every": None, "samples": 0}, "checkpoint": {"every": None}}
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train = {"max_steps": 1, "learning_rate": 1e-12, "seed": seed}
        final, _ = run(launch(scoring(model_folder(seed=0), pairs, train=train, **settings), name))
        heads.append(AutoModelForSequenceClassification.from_pretrained(final).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_scores_that_were_not_measured_are_not_those_of_the_model_it_started_from(
    launch: Launch, model_folder: ModelFolder, pairs: str
) -> None:
    first, _ = run(launch(scoring(model_folder(seed=0), pairs, train={"max_steps": 1}), "first"))
    assert hasattr(AutoConfig.from_pretrained(first), "score_mean")
    content = scoring(str(first), pairs, train={"max_steps": 1})
    del content["evaluation"], content["data"]["eval"]
    second, _ = run(launch(content, "second"))
    assert not hasattr(AutoConfig.from_pretrained(second), "score_mean")
    assert not hasattr(AutoConfig.from_pretrained(second), "score_std")


def test_an_end_that_pads_is_still_scored(launch: Launch, pairs: str, tmp_path: Path) -> None:
    """transformers would score the token before it; without a padding token it takes the last."""
    build_model(seed=0, scalar=True).save_pretrained(tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "model")
    launched = launch(scoring(str(tmp_path / "model"), pairs, train={"max_steps": 1}))
    final, metrics = run(launched)
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert launched.data.eval is not None
    rows = [row for i in range(len(launched.data.eval)) for row in launched.data.eval.rows(i)]
    assert all(row.response_ids[-1] == EOS for row in rows)
    with torch.no_grad():
        scores = [float(model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits) for row in rows]
    assert metrics["eval/rewards/chosen"] == pytest.approx(sum(scores[0::2]) / len(scores[0::2]), abs=1e-5)


def ppo(model_folder: ModelFolder, pairs: str, **sections: Any) -> dict[str, Any]:
    reward = sections.pop("reward", None) or model_folder(seed=3, scalar=True)
    return actor_critic(model_folder(seed=0), reward, model_folder(seed=4), pairs, **sections)


def test_a_reward_without_the_scale_of_its_scores_is_refused_where_scores_are_normalized(
    launch: Launch, model_folder: ModelFolder, pairs: str
) -> None:
    launched = launch(ppo(model_folder, pairs, objective={"normalize_reward": True}))
    sentence = r"toy.yaml:\d+:\d+: models.reward: the objective normalizes scores, and this reward has no mean and"
    with pytest.raises(UserError, match=sentence) as caught:
        run(launched)
    assert "\n" not in str(caught.value)
    function = {"models": {"reward": "python:json:dumps"}, "objective": {"normalize_reward": True}}
    with pytest.raises(UserError, match="this reward has no mean"):
        run(launch(ppo(model_folder, pairs, **function)))


def test_scores_are_normalized_with_what_their_model_measured(
    launch: Launch, model_folder: ModelFolder, pairs: str
) -> None:
    reward, _ = run(launch(scoring(model_folder(seed=3, scalar=True), pairs, train={"max_steps": 1}), "reward"))
    config = AutoConfig.from_pretrained(reward)
    seen = []
    for name, normalized in (("plain", False), ("normalized", True)):
        settings = {"normalize_reward": normalized, "reward_clip": None}
        once = {"train": {"max_steps": 1}, "logging": {"every": 1}, "evaluation": {"every": None, "samples": 0}}
        launched = launch(ppo(model_folder, pairs, reward=str(reward), objective=settings, **once), name)
        run(launched)
        seen.append(lines(launched.folder.path)[0]["objective/scores"])
    assert abs(seen[0] - seen[1]) > 1e-3
    assert seen[1] == pytest.approx((seen[0] - config.score_mean) / config.score_std, rel=1e-3)


def test_a_critic_may_start_from_a_language_model_and_only_the_policy_is_kept(
    launch: Launch, model_folder: ModelFolder, pairs: str
) -> None:
    content = ppo(model_folder, pairs, train={"critic_learning_rate": 3e-3}, logging={"every": 1})
    launched = launch(content)
    final, _ = run(launched)
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    training = [line for line in lines(launched.folder.path) if line["split"] == "train"]
    assert training[5]["critic/learning_rate"] == pytest.approx(3 * training[5]["learning_rate"])
    assert all(line["critic/grad_norm"] > 0 for line in training)
    assert training[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)  # nothing has moved since the rollout
    assert training[0]["kl/policy_reference"] == pytest.approx(0.0, abs=1e-5)
    assert sorted(file.name for file in (launched.folder.path / "samples").glob("step-*")) == [
        "step-000001.jsonl",
        "step-000005.jsonl",
        "step-000009.jsonl",
    ]


def test_prompts_that_are_all_the_same_are_refused_before_anything_is_written(
    launch: Launch, model_folder: ModelFolder, tmp_path: Path
) -> None:
    data = tmp_path / "same.jsonl"
    rows = [{"prompt": "w01 w02", "completion": f"w{i:02d}", "label": i % 2 == 0} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"all 4 examples of step 1 have the same prompt, .*; raise it, or give more"):
        launch(unpaired(model_folder(seed=0), str(data)))
    assert not (tmp_path / "run").exists()
