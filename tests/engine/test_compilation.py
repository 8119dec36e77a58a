"""`engine.compile`: the same numbers, where there is a compiler, and a sentence where there is none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from aligndistil.engine import compilation
from aligndistil.engine.compilation import compiles_head
from aligndistil.engine.processes import Processes
from aligndistil.errors import MissingError
from aligndistil.recipe import Engine
from support.engines import models_of, trained

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compilation._cannot_compile.cache_clear()

    def refused(function: object) -> None:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr("torch.compile", refused)
    yield
    compilation._cannot_compile.cache_clear()


@pytest.mark.parametrize(
    ("asked", "device", "compiles"),
    [("auto", CPU, False), ("auto", CARD, True), ("never", CARD, False), ("head", CPU, True), ("all", CPU, True)],
)
def test_it_is_done_on_a_card_and_where_it_is_asked_for(
    asked: str, device: torch.device, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_cannot_compile", lambda device: "")
    assert compiles_head(Engine.model_validate({"compile": asked}), device) is compiles


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_what_is_asked_for_is_refused_and_auto_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sentence = r"engine.compile: torch.compile does not work here \(no g\+\+ here\); install a C\+\+ compiler, or write"
    with pytest.raises(MissingError, match=sentence):
        compiles_head(Engine(compile="head"), CPU)
    with caplog.at_level(logging.WARNING, logger="aligndistil"):
        assert not compiles_head(Engine(), CARD)
    assert "the head is not compiled, and slower for it: torch.compile does not work here (no g++ here)" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("asked", ["head", "all"])
@pytest.mark.parametrize(("name", "stage"), [("dpo", 0), ("aligndistil", 2)])
def test_training_compiled_is_training(
    name: str, stage: int, asked: str, model_folder: Callable[..., str], processes: Processes
) -> None:
    models = models_of(name, model_folder)
    losses, norms, weights = trained(name, models, processes, {"zero_stage": stage})
    ours, our_norms, state = trained(name, models, processes, {"zero_stage": stage, "compile": asked})
    assert ours == pytest.approx(losses, abs=1e-5)
    assert our_norms == pytest.approx(norms, rel=1e-4)
    assert state.keys() == weights.keys()
    for parameter, value in state.items():
        torch.testing.assert_close(value, weights[parameter], atol=2e-5, rtol=0)
