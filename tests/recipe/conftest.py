"""A recipe is text in a folder of its own; what is refused is read line by line."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from aligndistil.errors import UserError
from aligndistil.recipe import Recipe, load_recipe

Load = Callable[..., Recipe]
Refused = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write: Callable[[str, str], Path]) -> Load:
    return lambda text, *overrides: load_recipe(write("r.yaml", text), overrides)


@pytest.fixture
def refused(load: Load) -> Refused:
    def refused(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        return str(caught.value).splitlines()

    return refused


@pytest.fixture
def sft() -> str:
    """The shortest recipe."""
    return "objective: {name: sft}\nmodel: {path: m}\ndata: {train: {path: d}}\n"


@pytest.fixture
def three_stages() -> str:
    return dedent("""\
        model: {path: builtin:tiny}
        models: {reference: builtin:tiny}
        data: {train: {path: builtin:reviews}, eval: {path: builtin:reviews, split: test}}
        train: {learning_rate: 1e-4, batch_size: 32, micro_batch_size: 8, epochs: 2}
        stages:
          aligndistil:
            objective: {name: aligndistil, r: 5}
            models: {teacher: "stage:dpo", reverse_teacher: "stage:reverse_dpo"}
            rollout: {max_new_tokens: 64}
          dpo: {objective: {name: dpo, beta: 0.1}}
          reverse_dpo: {objective: {name: dpo, beta: 0.1}, data: {reverse_preferences: true}}
        """)
