"""A reward that is the user's function: what it is given, where its answer goes, and what it may not answer."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndistil.batch import Batch, DataKind, Row, collate
from aligndistil.errors import EXIT_USAGE, UserError
from aligndistil.training import is_code, source_of
from aligndistil.training.python_reward import PythonReward
from support.models import build_tokenizer

USER, BOT = 3, 4
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Puts a module into the current folder, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return f"python:{name}:score"

    yield write
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], PythonReward]:
    """A reward whose function is given."""

    def build(function: Callable[..., Any]) -> PythonReward:
        module = types.ModuleType("toy_reward")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "toy_reward", module)
        return PythonReward("python:toy_reward:score", build_tokenizer())

    return build


def batch() -> Batch:
    """The second response was cut; the third is its end alone."""
    rows = [Row([USER, 5, BOT], [7, 8, 1]), Row([USER, 6, 6, BOT], [9, 10, 11, 12]), Row([USER, BOT], [1])]
    return collate(rows, DataKind.RESPONSES, pad_id=0)


def test_the_function_is_given_texts_and_ids_and_scores_the_last_token_of_each(
    answering: Callable[[Callable[..., Any]], PythonReward],
) -> None:
    given: dict[str, Any] = {}

    def function(**told: Any) -> list[float]:
        given.update(told)
        return [0.5, -2, 3.0]

    scores = answering(function).scores(batch())
    assert given == {
        "prompts": ["<user> w00 <bot>", "<user> w01 w01 <bot>", "<user> <bot>"],
        "responses": ["w02 w03", "w04 w05 w06 w07", ""],
        "prompt_ids": [[USER, 5, BOT], [USER, 6, 6, BOT], [USER, BOT]],
        "response_ids": [[7, 8, 1], [9, 10, 11, 12], [1]],
    }
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[0, 0, 0, 0, 0, 0.5, 0, 0], [0] * 7 + [-2], [0, 0, 3, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("kind", [torch.tensor, tuple, iter])
def test_anything_that_holds_numbers_will_do(
    kind: Callable[[Sequence[float]], Any], answering: Callable[[Callable[..., Any]], PythonReward]
) -> None:
    scores = answering(lambda **told: kind([1.0, 2.0, 3.0])).scores(batch())
    assert scores.amax(-1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            [1.0, 2.0],
            "was given 3 responses and returned 2 numbers, 2 of them finite; it must return one finite number",
        ),
        ([], "was given 3 responses and returned 0 numbers, 0 of them finite"),
        ([1.0, float("nan"), float("inf")], "was given 3 responses and returned 3 numbers, 1 of them finite"),
        (None, "must return a list of numbers, not None"),
        (0.5, "must return a list of numbers, not 0.5"),
        (["good", "bad", "good"], r"must return a list of numbers, not \['good', 'bad', 'good'\]"),
        ([[1], [2], [3]], "must return a list of numbers, not"),
    ],
)
def test_what_is_no_score_for_each_response_is_one_sentence(
    answer: Any, sentence: str, answering: Callable[[Callable[..., Any]], PythonReward]
) -> None:
    with pytest.raises(UserError, match=f"^models.reward: python:toy_reward:score {sentence}") as caught:
        answering(lambda **told: answer).scores(batch())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def test_an_error_of_the_function_itself_keeps_its_traceback(
    answering: Callable[[Callable[..., Any]], PythonReward],
) -> None:
    def function(**told: Any) -> list[float]:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        answering(function).scores(batch())


def test_a_module_of_the_current_folder_is_found(write: Write) -> None:
    path = write("mine_is_here", "def score(*, responses, **told):\n    return [len(r.split()) for r in responses]\n")
    assert PythonReward(path, build_tokenizer()).scores(batch()).amax(-1).tolist() == [2, 4, 0]


def test_a_module_or_function_that_is_not_there_is_one_sentence(write: Write) -> None:
    write("mine_is_bare", "def scores(): ...\nscore = 3\n")
    write("mine_imports", "import no_such_package_at_all\n")
    sentences = {
        "python:nowhere_to_be_found:score": "there is no module 'nowhere_to_be_found' for python:nowhere_to_be_found:",
        "python:mine_imports:score": "there is no module 'no_such_package_at_all' for python:mine_imports:score; start",
        "python:mine_is_bare:other": "module 'mine_is_bare' has no function 'other', which python:mine_is_bare:other",
        "python:mine_is_bare:score": "module 'mine_is_bare' has no function 'score'",
    }
    for path, sentence in sentences.items():
        with pytest.raises(UserError, match=f"^{sentence}"):
            source_of(path)


def test_the_text_of_a_function_is_that_of_its_module_and_of_the_one_it_comes_from(write: Write) -> None:
    write("mine_is_behind", "def score(**told):\n    return [1]\n")
    path = write("mine_is_before", "from mine_is_behind import score\n")
    assert source_of(path) == "from mine_is_behind import score\ndef score(**told):\n    return [1]\n"
    single = write("mine_is_alone", "def score(**told):\n    return [2]\n")
    assert source_of(single) == "def score(**told):\n    return [2]\n"
    assert functools.partial.__module__ == "functools"
    partial = write("mine_is_partial", "from functools import partial\nscore = partial(max, 3)\n")
    assert source_of(partial).startswith("from functools import partial\nscore = partial(max, 3)\n")


def test_only_paths_that_name_a_function_are_code() -> None:
    assert is_code("python:a:b")
    assert not any(is_code(path) for path in ("builtin:tiny", "stage:python", "python/model", "./python:a:b"))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("python:builtins:len", "python:builtins:len is no Python function of a .py file"),
        ("python:math:sqrt", "python:math:sqrt is no Python function of a .py file"),
        ("python:broken:score", "module 'broken' of python:broken:score cannot be imported: .*broken.py:2: "),
        ("python:raises:score", "module 'raises' of python:raises:score cannot be imported: .*raises.py:1: ZeroDiv"),
    ],
)
def test_a_function_that_cannot_be_used_is_the_user_s_mistake(
    path: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_text("x = 1\ndef score(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=sentence):
        source_of(path)
