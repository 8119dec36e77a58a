"""RewardBench 2: its scores worked out by hand, and rewards against what transformers computes of each text alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from aligndistil.benchmarks.files import Files
from aligndistil.benchmarks.rankers import Ranker, rankers_of
from aligndistil.benchmarks.reward_bench import SUBSETS, Choices, RewardBench2
from aligndistil.engine.processes import Processes
from aligndistil.errors import UserError
from aligndistil.models import model_hash
from aligndistil.recipe import Model, load_recipe
from aligndistil.run_folder import Done, RunFolder
from support.models import build_tokenizer
from support.recipes import merged, three_stages

ALONE = Processes(0, 1, torch.device("cpu"))
FOUR = [name for name in SUBSETS if name != "Ties"]


def row(name: str, subset: str, right: int = 1, wrong: int = 3) -> dict[str, Any]:
    answers = {"chosen": [f"right {i}" for i in range(right)], "rejected": [f"wrong {i}" for i in range(wrong)]}
    return {"id": name, "prompt": f"prompt {name}", **answers, "num_correct": right, "subset": subset}


def ranked(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> RewardBench2:
    pd.DataFrame(rows).to_parquet(folder / "reward_bench_2.parquet")
    return RewardBench2(Files(folder), **settings)


@pytest.mark.parametrize(
    ("scores", "value"),
    [([1, 0, 0.5, 0], 100), ([0, 1, 0, 0], 0), ([1, 1, 0, 0], 50), ([0, 1, 1, 0], 0), ([2, 2, 2, 2], 25)],
)
def test_the_right_one_of_four_shares_the_highest_score_with_its_equals(
    scores: list[float], value: float, tmp_path: Path
) -> None:
    found = ranked(tmp_path, [row("0", "Math"), row("0", "Focus")]).scores([scores, [1, 0, 0, 0]])
    assert {*found} == {"math", "focus"}  # no mean of six where there are not six
    np.testing.assert_array_equal(found["math"], [value, np.nan])
    np.testing.assert_array_equal(found["focus"], [np.nan, 100])


@pytest.mark.parametrize(
    ("tied", "reference", "value"),
    [
        # 1.5 above the wrong ones, 0.5 apart, 0.8 in the other question: everything, and tanh(0.8 / 0.5 - 1)
        ([3, 2.5, 1, 0], [2, 1.2], 100 + math.tanh(0.6)),
        # 0.6 above, 0.5 apart, 0.1 in the other: not the second distance; tanh(0.1 / 0.5 - 1)
        ([1, 0.5, -0.1, -0.1], [0.1, 0], 80 + math.tanh(-0.8)),
        # 0.5 above, 1 apart, 2 in the other: right, but not by enough; tanh(0.5 / 1 - 1)
        ([1.5, 0.5, 0, 0], [2, 0], 60 + math.tanh(-0.5)),
        # 1 below and 2 apart, 3 in the other
        ([1, -1, 0, 0], [3, 0], 30 + math.tanh(-1.5)),
        # no difference: the quotient is infinite, either way, or it is 0 / 0
        ([1, 1, 0, 0], [0.5, 0], 101),
        ([0, 0, 1, 1], [0, 1], -1),
        ([1, 1, 0, 0], [1, 1], 50),
    ],
)
def test_a_couple_of_ties_by_hand(tied: list[float], reference: list[float], value: float, tmp_path: Path) -> None:
    benchmark = ranked(tmp_path, [row("tied:7", "Ties", 2, 2), row("ref:7", "Ties", 1, 1)])
    np.testing.assert_allclose(benchmark.scores([tied, reference])["ties"], [value, np.nan], atol=1e-12)


def test_values_have_the_mean_and_the_error_of_six_subsets_of_different_size(tmp_path: Path) -> None:
    rows = [row(str(i), subset) for n, subset in enumerate(FOUR) for i in range(4 + 3 * n)]
    rows += [row(f"{kind}:{i}", "Ties", 2 if kind == "tied" else 1, 2) for i in range(5) for kind in ("ref", "tied")]
    draw = np.random.default_rng(0)
    scores = [draw.normal(size=len(one["chosen"]) + len(one["rejected"])).tolist() for one in rows]
    values = ranked(tmp_path, rows).scores(scores)
    assert list(values) == list(RewardBench2.metrics)
    subsets = [values[name][~np.isnan(values[name])] for name in SUBSETS.values()]
    assert [len(of_subset) for of_subset in subsets] == [4, 7, 10, 13, 16, 5]
    errors = [of_subset.var(ddof=1) / len(of_subset) for of_subset in subsets]
    score = values["score"]
    assert score.mean() == pytest.approx(np.mean([of_subset.mean() for of_subset in subsets]))
    assert score.std(ddof=1) / math.sqrt(len(score)) == pytest.approx(math.sqrt(sum(errors)) / 6)


def test_some_rows_are_taken_evenly_and_couples_stay_together(tmp_path: Path) -> None:
    rows = [row(str(i), subset) for subset in FOUR for i in range(3)]
    rows += [row(f"ref:{i}", "Ties", 1, 2) for i in range(3)] + [row(f"tied:{i}", "Ties", 2, 2) for i in range(3)]
    whole, part = ranked(tmp_path, rows), ranked(tmp_path, rows, limit=7)
    assert [one.id for one in whole.rows[:2]] == ["factuality/0", "factuality/1"]
    assert not whole.notes
    assert [one.id for one in part.rows] == [f"{SUBSETS[name]}/0" for name in FOUR] + ["ties/ref:0", "ties/tied:0"]
    assert "7 of its prompts" in part.notes[0]
    assert part.questions[0].turns == ("prompt 0",)


def test_rows_are_read_as_text_too(tmp_path: Path) -> None:
    rows = [row("0", "Math"), row("ref:0", "Ties"), row("tied:0", "Ties", 2)]
    rows[0]["prompt"] = "one line\u2028of two"
    (tmp_path / "reward_bench_2.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    read = RewardBench2(Files(tmp_path))
    assert read.rows == ranked(tmp_path, rows).rows
    assert read.rows[0].prompt == rows[0]["prompt"]
    assert read.rows[2].responses[:2] == ("right 0", "right 1")
    assert "is not compared with the original" in read.notes[0]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([row("0", "Chat")], "is not RewardBench 2"),
        ([row("0", "Math", 4, 0)], "row 0 has no prompt with right and wrong"),
        ([row("7", "Ties", 2)], "is called otherwise"),
        ([row("0", "Math"), row("tied:1", "Ties", 2)], "not couples"),
        ([row("ref:0", "Ties"), row("tied:1", "Ties", 2)], "not couples"),
        ([], "has no row"),
    ],
)
def test_another_file_is_refused(rows: list[dict[str, Any]], why: str, tmp_path: Path) -> None:
    (tmp_path / "reward_bench_2.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(UserError, match=why):
        RewardBench2(Files(tmp_path))


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reward_bench_2.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not RewardBench 2"):
        RewardBench2(Files(tmp_path))


ROWS = [
    Choices("math/0", "math", "w01 w02 w03", ("w10 w11", "w12", "w13 w14 w15 w16", "w17 w18 w19"), 1),
    Choices("focus/0", "focus", "w04", ("w20", "w21 w22 w23 w24 w25 w26"), 1),
]
SEEDS = {"dpo": 1, "reverse": 2, "policy": 3, "simpo": 4, "sft": 5}


@pytest.fixture
def run(
    tmp_path: Path,
    recipe_file: Callable[..., Path],
    pairs_file: Callable[..., str],
    model_folder: Callable[..., str],
) -> Path:
    """A finished run: each stage with what it was trained as, and with other random weights as its final model."""
    scorer = {"objective": {"name": "reward_model"}}
    more = {"simpo": {"objective": {"name": "simpo"}}, "scorer": scorer, "sft": {"objective": {"name": "sft"}}}
    recipe = load_recipe(recipe_file(merged(three_stages(model_folder(seed=0), pairs_file(6)), {"stages": more})))
    folder, weights = RunFolder(tmp_path / "run"), dict[str, str]()
    for name, stage in recipe.stages.items():
        final = folder.stage(name).final
        source = model_folder(seed=6, scalar=True) if name == "scorer" else model_folder(seed=SEEDS[name])
        shutil.copytree(source, final)
        weights[name] = model_hash(str(final))
        inputs = {one: weights[one] for one in stage.inputs}
        about = {"fingerprint": "f", "step": 1, "seconds": 1.0, "metrics": {}}
        done = Done(weights=weights[name], inputs=inputs, resolved=stage.resolved(), **about)
        folder.stage(name).write_done(done)
    return folder.path


def texts(prompt: str, response: str) -> tuple[list[int], int]:
    """The ids of the whole conversation, and how many of them are the prompt's."""
    tokenizer = build_tokenizer()
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole, before = (tokenizer.apply_chat_template(part, tokenize=False) for part in (turns, turns[:1]))
    ids, opening = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, before))
    assert ids[: len(opening)] == opening
    return ids, len(opening)


@torch.no_grad()
def logps(path: str, prompt: str, response: str, longest: int = 99) -> list[float]:
    """Of each response token."""
    ids, start = texts(prompt, response)
    ids = ids[: start + longest]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    table = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return [float(table[i - 1, ids[i]]) for i in range(start, len(ids))]


def every(reward: Callable[[str, str], float]) -> list[list[float]]:
    return [[reward(one.prompt, response) for response in one.responses] for one in ROWS]


def test_every_reward_of_a_run_is_what_transformers_computes(run: Path, model_folder: Callable[..., str]) -> None:
    rankers = {one.name: one for one in rankers_of(str(run), Model(path="unused"))}
    base = model_folder(seed=0)
    assert {name: one.kind for name, one in rankers.items()} == {
        f"dpo / {Path(base).name}": "implicit",
        f"reverse / {Path(base).name}": "implicit",
        "dpo / reverse": "contrastive",
        "simpo": "implicit",
        "scorer": "score",
    }
    final = {name: str(run / name / "final") for name in (*SEEDS, "scorer")}
    classifier = AutoModelForSequenceClassification.from_pretrained(final["scorer"], dtype=torch.float32)
    expected = {
        f"dpo / {Path(base).name}": every(lambda x, y: sum(logps(final["dpo"], x, y)) - sum(logps(base, x, y))),
        "dpo / reverse": every(lambda x, y: sum(logps(final["dpo"], x, y)) - sum(logps(final["reverse"], x, y))),
        "simpo": every(lambda x, y: float(np.mean(logps(final["simpo"], x, y)))),
        "scorer": every(lambda x, y: classifier(torch.tensor([texts(x, y)[0]])).logits.item()),
    }
    for name, values in expected.items():
        seen: list[int] = []
        found = rankers[name].rank(
            ROWS,
            ALONE,
            batch_size=4,
            max_length=64,
            on_progress=seen.append,
        )
        assert not found.notes
        for ours, theirs in zip(found.scores, values, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        assert sum(seen) == (6 if rankers[name].against is None else 12)


def test_a_stage_s_own_folder_is_its_own_reward(run: Path) -> None:
    for path in (run / "scorer", run / "scorer" / "final"):
        (found,) = rankers_of(str(path), Model(path="unused"))
        assert (found.name, found.kind, Path(found.model)) == ("scorer", "score", run / "scorer" / "final")


def test_long_responses_are_cut_and_counted_and_empty_ones_are_their_end(run: Path) -> None:
    rows = [Choices("math/0", "math", "w01", ("w10 w11 w12", "", "w14"), 1)]
    ranker = next(one for one in rankers_of(str(run), Model(path="unused")) if one.name == "simpo")
    found = ranker.rank(rows, ALONE, batch_size=2, max_length=2)
    wanted = [np.mean(logps(ranker.model, "w01", text, 2)) for text in ("w10 w11 w12", "", "w14")]
    assert found.scores[0] == pytest.approx(wanted, abs=1e-5)
    assert found.notes == ["simpo: 1 of 3 responses were cut at 2 tokens."]


def test_any_model_with_a_scalar_head_ranks_and_no_other(model_folder: Callable[..., str]) -> None:
    scalar, plain = model_folder(seed=6, scalar=True), model_folder(seed=0)
    (found,) = rankers_of(scalar, Model(path=scalar))
    assert len(found.rank(ROWS, ALONE, batch_size=8, max_length=64).scores[1]) == 2
    (other,) = rankers_of(plain, Model(path=plain))
    with pytest.raises(UserError, match=r"lacks score\.weight"):
        other.rank(ROWS, ALONE, batch_size=8, max_length=64)


def test_what_stands_for_no_reward_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stands for no reward"):
        rankers_of(str(run / "sft"), Model(path="unused"))
    with pytest.raises(UserError, match="no finished stage and no model"):
        rankers_of(str(tmp_path), Model(path="unused"))


def test_a_model_that_was_trained_again_is_no_reward_s_other_half(run: Path) -> None:
    stage = RunFolder(run).stage("reverse")
    done = stage.read_done()
    assert done is not None
    stage.write_done(done.model_copy(update={"weights": "others"}))
    with pytest.raises(UserError, match="policy was trained with this model, and it is gone or was trained again"):
        rankers_of(str(run), Model(path="unused"))


def test_both_halves_need_the_same_tokens_and_scores_must_be_numbers(
    run: Path, tmp_path: Path, model_folder: Callable[..., str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder(seed=0), other)
    build_tokenizer([f"v{number:02d}" for number in range(91)]).save_pretrained(other)
    section = Model(path=str(run / "dpo" / "final"))
    with pytest.raises(UserError, match="another tokenizer"):
        Ranker("x", "implicit", section.path, section, str(other)).rank(ROWS, ALONE, batch_size=8, max_length=64)
    broken = AutoModelForCausalLM.from_pretrained(section.path, dtype=torch.float32)
    broken.model.norm.weight.data.fill_(math.nan)
    broken.save_pretrained(other)
    AutoTokenizer.from_pretrained(section.path).save_pretrained(other)
    with pytest.raises(UserError, match="hidden states that are not finite: its weights are damaged"):
        Ranker("x", "implicit", str(other), section).rank(ROWS, ALONE, batch_size=8, max_length=64)
