"""Which responses are shown: answers to prompts, rows of the evaluation data, or answers to its first rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aligndistil.errors import UserError
from aligndistil.models import load_model, load_tokenizer, stop_ids
from aligndistil.rollout import LoadedModel
from aligndistil.token_view import Request, Response, find_stage
from aligndistil.token_view.responses import SHOWN, answer, choose

Finished = Callable[..., Path]


def shown(folder: Path, request: Request) -> list[Response]:
    stage = find_stage(folder)
    tokenizer = load_tokenizer(stage.model.path, stage.model)
    stops = stop_ids(stage.model.path, stage.model, tokenizer)
    policy = load_model(stage.model.path, stage.model, trained=False)
    chosen = choose(stage, request, tokenizer, stops)
    return answer(stage, chosen, request.max_new_tokens, LoadedModel(policy, tokenizer, stops, 96, batch_size=8))


def pairs(run: Path) -> list[dict[str, str]]:
    """The rows that the evaluation data was read from."""
    data = yaml.safe_load((run / "policy" / "recipe.resolved.yaml").read_text())["data"]
    return [json.loads(line) for line in Path(data["eval"][0]["path"]).read_text().splitlines()]


def words(run: Path, response: Response) -> str:
    stage = find_stage(run / "policy")
    return str(load_tokenizer(stage.model.path, stage.model).decode(list(response.row.response_ids)))


def test_a_row_of_pairs_shows_both_responses_chosen_first(finished: Finished) -> None:
    run = finished()
    chosen, rejected = shown(run / "policy", Request(rows=[3]))
    assert [chosen.label, rejected.label] == ["row 3 chosen", "row 3 rejected"]
    assert words(run, chosen) == pairs(run)[2]["chosen"] + " <eos>"
    assert words(run, rejected) == pairs(run)[2]["rejected"] + " <eos>"
    assert chosen.finished


def test_a_stage_trained_on_reversed_pairs_shows_them_the_right_way_round(finished: Finished) -> None:
    run = finished(stages={"reverse": {"data": {"reverse_preferences": True}}})
    chosen, _ = shown(run / "reverse", Request(rows=[1]))
    assert words(run, chosen) == pairs(run)[0]["chosen"] + " <eos>"


def test_without_a_wish_the_policy_answers_the_first_rows(finished: Finished) -> None:
    answers = shown(finished() / "policy", Request())
    assert [one.label for one in answers] == [f"answer to row {number}" for number in range(1, SHOWN + 1)]
    assert all(0 < len(one.row.response_ids) <= 6 for one in answers)


def test_prompts_come_first_and_equal_seeds_give_equal_answers(finished: Finished) -> None:
    run = finished()
    request = Request(prompts=["w01 w02", "w03"], rows=[1], seed=7)
    first = shown(run / "policy", request)
    assert [one.label for one in first] == ["prompt 1", "prompt 2", "row 1 chosen", "row 1 rejected"]
    assert shown(run / "policy", request) == first
    other = shown(run / "policy", Request(prompts=["w01 w02", "w03"], rows=[1], seed=8))
    assert other[:2] != first[:2]
    assert other[2:] == first[2:]


def test_the_longest_answer_can_be_set(finished: Finished) -> None:
    (one,) = shown(finished() / "policy", Request(prompts=["w05"], max_new_tokens=2))
    assert len(one.row.response_ids) <= 2


def test_a_row_of_prompts_alone_is_answered(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w01"}\n{"prompt": "w02 w03"}\n')
    run = finished(stages={"policy": {"data": {"eval": {"path": str(file), "limit": None}}}})
    (one,) = shown(run / "policy", Request(rows=[2]))
    assert one.label == "answer to row 2"
    assert one.row.response_ids


@pytest.mark.parametrize("row", [0, 6])
def test_a_row_that_is_not_there_is_refused(finished: Finished, row: int) -> None:
    with pytest.raises(UserError, match=f"--row {row}: the evaluation data has rows 1 to 5; give one of them"):
        shown(finished() / "policy", Request(rows=[row]))


def test_a_prompt_without_a_token_is_refused(finished: Finished) -> None:
    run = finished()
    (run / "policy" / "final" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="--prompt '': empty prompt; give another"):
        shown(run / "policy", Request(prompts=["w01", ""]))


@pytest.mark.parametrize("unanswerable", [Request(), Request(rows=[1])])
def test_without_evaluation_data_a_prompt_is_asked_for(finished: Finished, unanswerable: Request) -> None:
    run = finished()
    file = run / "policy" / "recipe.resolved.yaml"
    resolved = yaml.safe_load(file.read_text())
    resolved["data"]["eval"] = None
    file.write_text(yaml.safe_dump(resolved))
    with pytest.raises(UserError, match="give --prompt TEXT"):
        shown(run / "policy", unanswerable)
    assert shown(run / "policy", Request(prompts=["w01"]))
