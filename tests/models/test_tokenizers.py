"""Tokenizers: what ends a response, whose template, and whether two models speak about the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndistil.errors import UserError
from aligndistil.models import (
    check_same_tokenizer,
    load_model,
    load_scalar_model,
    load_tokenizer,
    shared_vocab,
    stop_ids,
)
from aligndistil.recipe import Model
from support.models import CHAT, WORDS, build_model, build_tokenizer

ModelFolder = Callable[..., str]


def section(path: str, **fields: Any) -> Model:
    return Model.model_validate({"path": path, **fields})


@pytest.fixture
def copy(model_folder: ModelFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(seed=0), tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_response_ends_at_every_id_that_any_file_of_the_model_names(copy: Path) -> None:
    path = str(copy)
    tokenizer = load_tokenizer(path, section(path))
    assert stop_ids(path, section(path), tokenizer) == {1}
    edit(copy / "config.json", eos_token_id=[1, 40])
    edit(copy / "generation_config.json", eos_token_id=[41, 1])
    assert stop_ids(path, section(path), tokenizer) == {1, 40, 41}
    (copy / "generation_config.json").unlink()
    assert stop_ids(path, section(path), tokenizer) == {1, 40}


def test_a_chat_template_may_be_given_as_text_or_as_a_file(copy: Path, tmp_path: Path) -> None:
    path = str(copy)
    assert load_tokenizer(path, section(path)).chat_template == CHAT
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_tokenizer(path, section(path, chat_template=template)).chat_template == template
    file = tmp_path / "mine.jinja"
    file.write_text(template, encoding="utf-8")
    assert load_tokenizer(path, section(path, chat_template=str(file))).chat_template == template
    with pytest.raises(UserError, match=r"model.chat_template: 'absent.jinja' is no file and no Jinja template"):
        load_tokenizer(path, section(path, chat_template="absent.jinja"))


def test_a_tokenizer_without_padding_pads_with_its_end(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(str(copy), section(str(copy)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == 96  # and nothing was added


def test_a_tokenizer_without_an_end_is_refused(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"has no end-of-sequence token; set eos_token in its configuration"):
        load_tokenizer(str(copy), section(str(copy)))


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path), section(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_frozen_model_must_know_the_same_tokens() -> None:
    ours = build_tokenizer()
    check_same_tokenizer("teacher", ours, build_tokenizer())
    swapped = build_tokenizer(["w01", "w00", *WORDS[2:]])
    with pytest.raises(UserError, match=r"'teacher' has another tokenizer than the policy: 2 tokens differ, 'w00'"):
        check_same_tokenizer("teacher", ours, swapped)
    with pytest.raises(UserError, match=r"1 tokens differ, 'more' for one \(None and 96\)"):
        check_same_tokenizer("teacher", ours, build_tokenizer([*WORDS, "more"]))


def test_a_model_that_only_reads_may_know_more_tokens_but_not_fewer() -> None:
    ours, more = build_tokenizer(), build_tokenizer([*WORDS, "more"])
    check_same_tokenizer("reward", ours, more, extra_allowed=True)
    with pytest.raises(UserError, match=r"1 tokens differ, 'more' for one \(96 and None\)"):
        check_same_tokenizer("reward", more, ours, extra_allowed=True)
    with pytest.raises(UserError, match=r"2 tokens differ, 'w00'"):
        check_same_tokenizer("reward", ours, build_tokenizer(["w01", "w00", *WORDS[2:]]), extra_allowed=True)


@pytest.mark.parametrize(
    ("rows", "extra", "tokens"),
    [
        ([96], {}, 96),
        ([128], {}, 96),  # one model that pads its matrix: what is beyond the tokenizer is no token
        ([128, 104], {}, 96),
        ([96, 128], {}, 96),
        ([128, 104], {"<more>": 96}, 97),
        ([128], {"<far>": 120}, 121),  # ids have a gap, and its rows stay
        ([100, 128], {"<far>": 120}, 100),
    ],
)
def test_the_vocabulary_ends_with_the_tokenizer(
    rows: list[int], extra: dict[str, int], tokens: int, model_folder: ModelFolder
) -> None:
    paths = [model_folder(seed=0, vocab=count) for count in rows]
    models = [load_model(path, section(path), trained=False) for path in paths]
    tokenizer = build_tokenizer()
    names = tokenizer.get_vocab() | extra
    tokenizer.get_vocab = lambda: names
    assert shared_vocab(models, tokenizer) == tokens


def test_a_model_has_a_row_for_each_token(model_folder: ModelFolder) -> None:
    wide, narrow = model_folder(seed=0, vocab=128), model_folder(seed=0, vocab=100, scalar=True)
    scorer = load_scalar_model(narrow, section(narrow), trained=False)
    models = [load_model(wide, section(wide), trained=False), scorer]
    assert shared_vocab(models, build_tokenizer()) == 96
    with pytest.raises(UserError, match=r"has 100 rows for 106 tokens; resize its embeddings"):
        shared_vocab(models, build_tokenizer([*WORDS, *(f"x{i}" for i in range(10))]))
