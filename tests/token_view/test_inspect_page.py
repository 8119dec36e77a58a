"""The page is one file that loads nothing, holds the values that were computed, and cannot be broken by text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.cli import main
from aligndistil.errors import UserError
from aligndistil.models import load_model
from aligndistil.token_view import Request, Viewer, find_stage, inspect, write_page

Finished = Callable[..., Path]


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert len(found) == 1
    read: dict[str, Any] = json.loads(found[0])
    return read


def test_the_page_holds_the_objectives_own_terms(finished: Finished) -> None:
    run = finished()
    data = data_of(inspect(run, Request(prompts=["w01"], rows=[1])))
    stage = find_stage(run)
    policy, teacher, reverse = (
        load_model(path, stage.model, trained=False) for path in (stage.model.path, *stage.paths.values())
    )
    viewer = Viewer(stage.objective, policy, dict(zip(stage.paths, (teacher, reverse), strict=True)), vocab=96)
    for response, row in zip(data["responses"], rows_of(data), strict=True):
        values = viewer.values(row)
        for name, numbers in values.terms.items():
            assert response["terms"][name] == pytest.approx(numbers, rel=1e-5, abs=1e-7)
        assert response["loss"] == pytest.approx(values.loss, rel=1e-5, abs=1e-9)
        assert response["candidates"] == values.candidates
        assert response["ranks"] == values.ranks
        for name, table in values.probabilities.items():
            for rounded, exact in zip(response["probabilities"][name], table, strict=True):
                assert rounded == pytest.approx(exact, abs=1e-6)


def rows_of(data: dict[str, Any]) -> list[Any]:
    """The token ids of the page's responses; words of the toy vocabulary are tokens."""
    from aligndistil.batch import Row
    from support.models import build_tokenizer

    tokenizer = build_tokenizer()
    return [
        Row(
            [tokenizer.convert_tokens_to_ids(text.strip()) for text, _ in response["prompt"]],
            [token for _, _, token in response["tokens"]],
        )
        for response in data["responses"]
    ]


def test_the_page_says_what_was_compared_with_what(finished: Finished) -> None:
    data = data_of(inspect(finished(), Request(rows=[1])))
    assert [(one["label"], one["path"]) for one in data["distributions"]] == [
        ("teacher", "dpo"),
        ("reverse teacher", "reverse"),
        ("target", "what it learns"),
        ("policy", "this stage"),
    ]
    assert data["stage"] == "toy/policy"
    assert ["r", 5.0] in data["settings"]
    assert [one["key"] for one in data["terms"]][:4] == ["reward", "tvd", "alpha", "beta"]
    assert "loss_share" in [one["key"] for one in data["terms"]]
    assert [one["label"] for one in data["responses"]] == ["row 1 chosen", "row 1 rejected"]


def test_an_objective_without_distributions_shows_what_it_has(finished: Finished) -> None:
    data = data_of(inspect(finished() / "dpo", Request(rows=[1])))
    assert [one["key"] for one in data["terms"]] == ["log_ratio", "logp", "ref_logp"]
    assert [one["key"] for one in data["distributions"]] == ["reference", "policy"]
    assert data["responses"][0]["loss"] is None


def test_nothing_is_loaded_from_anywhere(finished: Finished) -> None:
    text = inspect(finished(), Request(rows=[1])).read_text()
    for outside in ("http://", "https://", "src=", "<link", "@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert outside not in text
    assert "default-src 'none'" in text


HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; @@script@@ \u2028 \\u003c"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", {"text": HOSTILE, HOSTILE: [1]})
    assert data_of(page) == {"text": HOSTILE, HOSTILE: [1]}
    assert page.read_text().count("</script>") == 2
    assert "<!--" not in page.read_text()


def test_a_number_that_json_does_not_know_is_null(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Viewer.values

    def infinite(self: Viewer, row: Any) -> Any:
        values = plain(self, row)
        values.terms["reward"][0], values.terms["reward"][1] = float("inf"), float("nan")
        return values

    monkeypatch.setattr(Viewer, "values", infinite)
    data = data_of(inspect(finished(), Request(rows=[1])))
    assert data["responses"][0]["terms"]["reward"][:2] == [None, None]


def test_a_wrong_row_is_refused_before_any_weight_is_read(finished: Finished) -> None:
    run = finished()
    (run / "dpo" / "final" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--row 99"):
        inspect(run, Request(rows=[99]))


def test_the_command_writes_the_page_and_says_where(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = finished()
    arguments = ["--row", "1", "--row", "2", "--prompt", "w01", "--top", "3", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["aligndistil", "inspect", str(run), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (None, 0)
    assert str(run / "policy" / "inspect.html") in capsys.readouterr().out
    data = data_of(run / "policy" / "inspect.html")
    assert (len(data["responses"]), data["top"]) == (5, 3)
    monkeypatch.setattr(sys, "argv", ["aligndistil", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "is no folder" in capsys.readouterr().err
